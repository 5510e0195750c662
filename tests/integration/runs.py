"""Training runs in processes of their own that can be watched, killed and compared.

Processes are forked from one that has imported everything, so that each starts in a moment.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from tests.integration.conftest import ROOT, TINY

Prepare = Callable[[], None]  # called in a process before its command: limits, injected faults
DEADLINE = 240.0  # seconds after which a process counts as hanging

_context = multiprocessing.get_context("forkserver")
_COMMANDS = ("check", "convert", "eval", "plan", "predict", "preview", "train")
_context.set_forkserver_preload(
    ["main", "torch.utils.tensorboard", "matplotlib.pyplot", "tests.integration.runs",
     *(f"engine.commands.{name}" for name in _COMMANDS)]
)  # fmt: skip


def _be_main(argv: list[str], output: str, method: str, prepare: Prepare | None) -> None:
    """Be `python main.py ARGV`, in a process group of its own."""
    import main

    multiprocessing.set_start_method(method, force=True)  # what Python does for loaders by itself
    os.setsid()
    os.chdir(ROOT)
    with Path(output).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if prepare is not None:
        prepare()
    sys.argv = [str(ROOT / "main.py"), *argv]
    try:
        sys.exit(main.main(argv))
    finally:
        atexit._run_exitfuncs()  # a forked process does not by itself


@dataclass(frozen=True)
class Running:
    """A command line under way."""

    process: ForkServerProcess
    output_file: Path

    @property
    def pid(self) -> int:
        """Return the number of the process and of its group."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def children(self) -> list[int]:
        """Return the numbers of the processes that it started."""
        return children(self.pid)

    @property
    def output(self) -> str:
        """Return what was printed so far."""
        return self.output_file.read_text(errors="replace") if self.output_file.exists() else ""

    def wait_until(self, condition: Callable[[], bool], *, pause: float = 0.005) -> None:
        """Look for a condition again and again; it must come true while the process lives."""
        end = time.monotonic() + DEADLINE
        while not condition():
            if not self.process.is_alive() or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"what was waited for did not come about: {self.output}")
            time.sleep(pause)

    def kill(self) -> None:
        """Kill the process group."""
        for send in (os.killpg, os.kill):  # it has no group yet when it has hardly begun
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, signal.SIGKILL)
        self.process.join(DEADLINE)

    def end(self) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        self.process.join(DEADLINE)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"hangs: {self.output}")
        return self.process.exitcode


def start(output_file: Path, *arguments: str | Path, prepare: Prepare | None = None) -> Running:
    """Start `main.py ARGUMENTS`; stdout and stderr go to a file."""
    output_file.unlink(missing_ok=True)
    words, method = [str(a) for a in arguments], multiprocessing.get_start_method()
    process = _context.Process(target=_be_main, args=(words, str(output_file), method, prepare))
    process.start()
    return Running(process, output_file)


@dataclass(frozen=True)
class Command:
    """`train` on the small model with options of its own, into one folder."""

    folder: Path
    options: tuple[str | Path, ...]

    def start(self, *more: str | Path, prepare: Prepare | None = None) -> Running:
        """Start a process."""
        return start(
            self.folder.with_name(f"{self.folder.name}.output"),
            "train", "--config", TINY, "--output_dir", self.folder, *self.options, *more,
            prepare=prepare,
        )  # fmt: skip

    def run(self, *more: str | Path, code: int = 0, prepare: Prepare | None = None) -> str:
        """Run to the end, which must be of that exit code; return the output."""
        running = self.start(*more, prepare=prepare)
        found = running.end()
        assert found == code, running.output
        return running.output


def children(pid: int) -> list[int]:
    """Return the numbers of a process's children (Linux)."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(word) for file in files for word in file.read_text().split())


def alive(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def errors(output: str) -> list[str]:
    """Return the lines that say why a command failed."""
    return [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error: ")]


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a log; none where there is no file yet."""
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return lines(folder / "metrics.jsonl")


def _without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if "time" not in k and "seconds" not in k} for e in entries]


def assert_same(value: Any, other: Any, place: str) -> None:
    """Compare checkpoints to the last bit."""
    assert type(value) is type(other), place
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, other), place
    elif isinstance(value, dict):
        assert value.keys() == other.keys(), place
        for key in value:
            assert_same(value[key], other[key], f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(other), place
        for i, (item, its) in enumerate(zip(value, other, strict=True)):
            assert_same(item, its, f"{place}[{i}]")
    else:
        assert value == other or value != value, place


def state_of(path: Path) -> dict[str, Any]:
    """Return what must not depend on interruptions."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    del content["config"]  # names its folder
    del content["progress"]["seconds"]
    for key in ("used", "evaluation"):  # of time
        content["progress"].get("time_limit", {}).pop(key, None)
    return content


def assert_same_runs(folder: Path, other: Path) -> None:
    """Compare the ends of two runs: checkpoints bit by bit, logs but for times."""
    for name in ("last.pth", "best.pth"):
        assert_same(state_of(folder / name), state_of(other / name), name)
    for name in ("log.txt", "metrics.jsonl"):
        found, expected = _without_times(lines(folder / name)), _without_times(lines(other / name))
        assert found == expected, name
