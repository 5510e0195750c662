"""Two runs in one folder: the second waits a little, then is refused; a killed one blocks none."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from engine.plan import run_lock
from tests.integration.runs import Command, alive, errors, metrics
from util.errors import ConfigError
from util.world import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes in /proc")


@pytest.mark.slow
def test_one_run_at_a_time(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--coco_path", shapes, "--epochs", "400", "--resume", "auto", "--num_workers", "1",
               "--eval_every", "400", "--device", "cpu")  # fmt: skip
    first = Command(folder, options).start()
    first.wait_until(lambda: len(metrics(folder)) >= 2)
    workers = first.children
    second = Command(tmp_path / "second", (*options, "--output_dir", folder))
    (message,) = errors(second.run("--gpus", "2", code=2))  # of two processes, both must end
    assert re.fullmatch(
        rf"error: rank \d: --output_dir {folder}: process {first.pid} on \S+ is training there\. "
        r"Wait for its end, or choose another folder\.",
        message,
    )
    steps = len(metrics(folder))
    first.wait_until(lambda: len(metrics(folder)) > steps)
    os.kill(first.pid, signal.SIGKILL)
    assert any(alive(worker) for worker in workers)  # they find out by themselves, later
    second.run("--max_steps", "1")
    assert not (folder / ".lock_holder").exists()
    first.kill()


def test_a_run_that_waited_for_another_continues_from_its_last_checkpoint(
    finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "run", ("--coco_path", shapes, "--resume", "auto"))
    with run_lock(command.folder, World()):  # a run that is about to end
        second = command.start()
        second.wait_until(lambda: f"waiting up to 15 s for process {os.getpid()}" in second.output)
        shutil.copy(finished_run / "last.pth", command.folder)
    assert second.end() == 0, second.output
    assert "this run is finished: 2 of 2 epochs" in second.output


def test_a_drive_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with run_lock(tmp_path / "run", World()):
        assert (tmp_path / "run").is_dir()


def test_the_lock_holder_may_become_visible_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.plan._FAR_PATIENCE", 0.1)
    monkeypatch.setattr(
        "engine.plan.time.sleep",
        lambda _: (tmp_path / ".lock_holder").write_text("process 7 on another.host\n"),
    )
    refused = pytest.raises(ConfigError, match=r"process 7 on another\.host is training there")
    with FileLock(tmp_path / ".lock"), refused, run_lock(tmp_path, World()):
        pass


HOLD = """
import filelock, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with filelock.FileLock(folder / ".lock"):
    (folder / ".lock_holder").write_text("process 7 on another.host\\n")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_lock_of_another_host_is_waited_for(tmp_path: Path) -> None:
    holding = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        command = Command(tmp_path, ("--resume", "auto", "--coco_path", tmp_path / "none"))
        waiting = command.start()
        begun = time.monotonic()
        waiting.wait_until(lambda: time.monotonic() > begun + 17)  # it would refuse its own host's
        (line,) = [x for x in waiting.output.splitlines() if "another.host" in x]
        place = f"output_dir {tmp_path}: "
        assert line.startswith(place + "waiting up to 100 s for process 7 on another.host to end")
        holder.communicate()
    assert waiting.end() == 2  # there are no such data
    assert "another.host" not in errors(waiting.output)[0]
