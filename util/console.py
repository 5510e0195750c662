"""Messages of the program: one logger for all rooms, and what shows it beside progress bars."""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("deformable_detr")


class _Console(logging.Handler):
    """Prints lines without breaking a progress bar."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = f"rank {rank}: " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{self._rank}{warning}{record.getMessage()}")
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
