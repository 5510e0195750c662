"""Messages of the program: one logger for all rooms, and what prints it."""

import contextlib
import errno
import logging
import os
import re
import sys
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("deformable_detr")
_LONGEST_ERROR = 500  # characters
LONGEST_NAME = 180  # characters: a name may be anything, a whole file in base64 too
# What a terminal obeys instead of showing it: control characters, and those that turn the direction
# of writing. Names in data come from strangers.
_COMMANDS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069"
_ESCAPED = re.compile(f"[{_COMMANDS}]")


def printable(text: str) -> str:
    """Return text of several lines with what a terminal would obey written as in Python."""
    return _ESCAPED.sub(lambda found: _escape(found[0]), text)


def in_line(name: str) -> str:
    """Return a name so that it stays within its line, with whatever nobody could see written out.

    So names that differ only in a zero-width space look different.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in name)


def short_name(name: str) -> str:
    """Return a name as it is printed: on one line, and cut where it is very long."""
    text = in_line(name[:LONGEST_NAME])
    return text if len(name) <= LONGEST_NAME else f"{text}…"


def _escape(character: str) -> str:
    return repr(character)[1:-1]


def error_line(text: str) -> str:
    """Return an error as one line of bounded length; of a longer one the middle is left out."""
    line = in_line(text)
    if len(line) <= _LONGEST_ERROR:
        return line
    end = _LONGEST_ERROR // 3
    return f"{line[: _LONGEST_ERROR - end - 5]} ... {line[-end:]}"


class _Console(logging.Handler):
    """Prints lines without breaking a progress bar."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = f"rank {rank}: " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(printable(f"{self._rank}{warning}{record.getMessage()}"))
        sys.stdout.flush()  # into a file, it would wait for many lines


def show_messages(rank: int = 0) -> None:
    """Print what is logged from now on.

    The main process of a run, of `rank` 0, prints everything; the others print warnings alone.
    """
    log.handlers = [_Console(rank)]
    log.setLevel(logging.WARNING if rank else logging.INFO)
    log.propagate = False


def console(message: str) -> None:
    """Log a line of a command's output."""
    log.info(message)


class _Steady:
    """A stream that survives its reader: what is written afterwards is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_lose():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_lose():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_lose(self) -> Any:
        try:
            yield
        except OSError as error:
            # `| head` has ended, or the terminal was closed
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_streams() -> None:
    """Let the program continue when nobody reads what it prints any more, or ever did."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program began
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (as long as we live)
        setattr(sys, name, _Steady(stream))
