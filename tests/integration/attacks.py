"""Commands on what strangers send: each in a process whose memory and time are limited.

The process is forked from one that has imported everything, so that a limit counts what the command
takes itself and each starts in a moment.
"""

import os
import re
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.integration.runs import errors, start

MEMORY = 500 * 2**20  # bytes that a refusal may take in addition to what Python and PyTorch do
SECONDS = 10  # of processor time
PATIENCE = 8  # times as many seconds may pass
LONGEST_LINE = 520  # characters
USUAL: dict[str, Any] = {"memory": 2**30, "seconds": 60}  # what training a tiny model may take
_OBEYED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # by a terminal


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    output: str

    @property
    def error(self) -> str:
        """Return the one line that says why it failed."""
        (line,) = errors(self.output)
        return line


def limit(memory: int, seconds: int, environment: Mapping[str, str | None]) -> None:
    """Limit this process from now on, and change its environment."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    signal.alarm(PATIENCE * seconds)  # for what only waits, even beside much other work
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def attack(
    folder: Path,
    *arguments: str | Path,
    memory: int = MEMORY,
    seconds: int = SECONDS,
    environment: Mapping[str, str | None] | None = None,
    first: Callable[[], None] | None = None,
) -> Outcome:
    """Run `main.py ARGUMENTS` within limits; `first` is called in its process before.

    Whatever it is given, there is no traceback, and nothing that a terminal would obey.
    """
    prepare = partial(_prepare, partial(limit, memory, seconds, environment or {}), first)
    running = start(folder / "attack.output", *arguments, prepare=prepare)
    outcome = Outcome(running.end(), running.output)
    assert "Traceback" not in outcome.output, outcome.output
    assert outcome.code in (0, 1, 2), outcome
    assert not _OBEYED.search(outcome.output.replace("\r", "")), outcome.output
    return outcome


def _prepare(limits: Callable[[], None], first: Callable[[], None] | None) -> None:
    if first is not None:
        first()
    limits()


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Check exit code 2 and one line of bounded length that has every part."""
    assert outcome.code == 2, outcome.output
    assert len(outcome.error) <= LONGEST_LINE, outcome.error
    for part in parts:
        assert part in outcome.error, outcome.error
