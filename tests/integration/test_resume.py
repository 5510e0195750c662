"""A run that stops can be continued, and ends as if it had not stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.integration.conftest import ROOT, TINY, Cli, read_log


def same_weights(a: Path, b: Path) -> bool:
    """Tell whether two checkpoints hold bit-equal weights."""
    first, second = (torch.load(p, weights_only=True)["model"] for p in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_stopped_in_an_epoch_ends_as_the_uninterrupted_one(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = cli("train", "--config", TINY, "--coco_path", shapes, "--output_dir", run,
                  "--max_steps", "6")  # fmt: skip
    assert started.returncode == 0, started.stderr
    resumed = cli("train", "--resume", run / "last.pth", "--max_steps", "0")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(run / "last.pth", finished_run / "last.pth")
    last, expected = read_log(run)[-1], read_log(finished_run)[-1]
    assert last["test_coco_eval_bbox"] == expected["test_coco_eval_bbox"]
    assert [line["epoch"] for line in read_log(run)] == [0, 1]


def test_ctrl_c_saves_and_says_how_to_go_on(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "main.py", "train", "--config", TINY, "--coco_path", str(shapes),
               "--output_dir", str(run), "--epochs", "500", "--eval_every", "500",
               "--num_workers", "1"]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "last.pth").exists():
        assert time.monotonic() < deadline, "no epoch ended"
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loader processes too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    resumed = cli("train", "--resume", run / "last.pth", "--max_steps", "1")
    assert resumed.returncode == 0, resumed.stderr


def test_resuming_another_model_names_the_options(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    done = cli("train", "--resume", finished_run / "last.pth", "--num_queries", "33",
               "--output_dir", tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert "num_queries: checkpoint 20, run 33" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
