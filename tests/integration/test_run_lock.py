"""Two runs in one folder: the second is refused, and a killed run leaves nothing that blocks."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.integration.runs import Command, alive, errors, metrics

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
        rf"error: rank \d: --output_dir {folder}: expected a folder that no other run writes to, "
        rf"but process {first.pid} on \S+ does\. Wait for its end, or choose another folder\.",
        message,
    )
    steps = len(metrics(folder))
    first.wait_until(lambda: len(metrics(folder)) > steps)
    os.kill(first.pid, signal.SIGKILL)
    assert any(alive(worker) for worker in workers)  # they find out by themselves, later
    second.run("--max_steps", "1")
    assert not (folder / ".lock").read_text()
    first.kill()
