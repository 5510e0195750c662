"""Several processes of the real command line: the results of one, and what happens when one fails.

All compute on the CPU and exchange over gloo.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from datasets.build import split_batch
from datasets.samplers import ShuffledBatchSampler
from tests.integration.conftest import ROOT, TINY, read_log
from tests.lanes import some

SEED = 42  # the default one
LIMIT = 150  # seconds that a command may take


def start(output: Path, *arguments: str | Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Start `main.py ARGUMENTS`, which prints into a file, in a process group of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *map(str, arguments), "--device", "cpu"],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )


def end(process: "subprocess.Popen[bytes]", limit: float = LIMIT) -> int:
    """Wait for the exit code; a process that hangs goes with its group."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def run(output: Path, *arguments: str | Path) -> tuple[int, list[str]]:
    """Return exit code and printed lines of `main.py ARGUMENTS`."""
    code = end(start(output, *arguments))
    return code, lines(output)


def lines(output: Path) -> list[str]:
    return output.read_text().replace("\r", "\n").splitlines()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pid_of_rank(launcher: int, rank: int) -> int:
    """Return the process of a rank that a launcher has started (Linux)."""
    for file in Path(f"/proc/{launcher}/task").glob("*/children"):
        for pid in file.read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
    raise AssertionError(f"no process has rank {rank}")


def assert_same_evaluation(folder: Path, expected: Path) -> None:
    for name in ("results.json", "detections.json"):
        assert (folder / "eval" / name).read_bytes() == (expected / "eval" / name).read_bytes()


@pytest.mark.parametrize("processes", some([2, 3], 2))
def test_evaluation_in_two_processes_is_the_same_to_the_last_byte(
    finished_run: Path, tmp_path: Path, processes: int
) -> None:
    code, printed = run(tmp_path / "out.txt", "eval", "--checkpoint", finished_run / "last.pth",
                        "--output_dir", tmp_path, "--gpus", str(processes))  # fmt: skip
    assert code == 0, printed
    assert_same_evaluation(tmp_path, finished_run)
    assert len([line for line in printed if line.startswith("7 images, ")]) == 1


@pytest.mark.slow
def test_srun_tasks_work_as_one_run(finished_run: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tasks = [
        start(
            tmp_path / f"{rank}.txt", "eval", "--checkpoint", finished_run / "last.pth",
            "--output_dir", tmp_path, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank), SLURM_STEP_NODELIST="localhost", SLURM_JOB_ID="1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [end(task) for task in tasks] == [0, 0], lines(tmp_path / "0.txt")
    assert_same_evaluation(tmp_path, finished_run)
    assert "AP" in (tmp_path / "0.txt").read_text()
    assert "AP" not in (tmp_path / "1.txt").read_text()


def uneven_data(shapes: Path, folder: Path) -> Path:
    """Return 8 images of which, in the first epoch of 2 processes, the second has no boxes.

    It can read none in step 1, and neither can the first in step 2.
    """
    shutil.copytree(shapes, folder)
    file = folder / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    images = content["images"] = content["images"][:8]
    orders = []
    for rank in range(2):
        sampler = ShuffledBatchSampler(
            8, split_batch(2, max_size=1, rank=rank, world_size=2), seed=SEED
        )
        orders.append([images[position] for ((position, _),) in sampler])
    boxed = {image["id"] for image in orders[0]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in boxed]
    file.write_text(json.dumps(content))
    for image in (orders[1][1], orders[0][2], orders[1][2]):
        path = folder / "train2017" / image["file_name"]
        path.write_bytes(path.read_bytes()[:300])
    return folder


def test_training_in_two_processes_equals_one(shapes: Path, tmp_path: Path) -> None:
    data = uneven_data(shapes, tmp_path / "data")
    options = ("train", "--config", TINY, "--coco_path", data, "--no_train_backbone_norm",
               "--effective_batch_size", "2", "--batch_size", "1", "--warmup_steps", "0",
               "--lr", "1e-4", "--lr_backbone", "1e-4", "--no_tensorboard")  # fmt: skip
    for processes in ("1", "2"):
        code, printed = run(tmp_path / f"{processes}.txt", *options, "--gpus", processes,
                            "--output_dir", tmp_path / processes)  # fmt: skip
        assert code == 0, printed
        unread = [line for line in printed if "cannot be read" in line]
        assert len({line.partition("warning: ")[2] for line in unread}) == 3
        by_rank_1 = sum("rank 1: warning" in line for line in unread)
        assert by_rank_1 >= 2 if processes == "2" else by_rank_1 == 0
    alone, shared = (metrics(tmp_path / processes) for processes in ("1", "2"))
    assert [line["step"] for line in shared] == [line["step"] for line in alone]
    assert [line["step"] for line in shared][:3] == [0, 1, 3]  # none without an image
    for one, two in zip(alone, shared, strict=True):
        for name in ("loss", "loss_ce", "loss_giou", "grad_norm", "class_error"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (one["step"], name)
    ends = [read_log(tmp_path / processes)[-1] for processes in ("1", "2")]
    for name in ("train_loss", "test_loss", "test_coco_eval_bbox"):
        assert ends[1][name] == pytest.approx(ends[0][name], rel=1e-4, abs=1e-4), name
    assert [end["train_steps"] for end in ends] == [4, 4]


@pytest.mark.slow
def test_what_all_processes_refuse_is_printed_once(shapes: Path, tmp_path: Path) -> None:
    code, printed = run(
        tmp_path / "out.txt", "train", "--config", TINY, "--coco_path", shapes, "--output_dir",
        tmp_path / "run", "--gpus", "4", "--effective_batch_size", "6",
    )  # fmt: skip
    assert code == 2, printed
    (line,) = [line for line in printed if "error" in line.lower()]
    assert line == printed[-1]
    assert line.startswith("error: rank ")
    assert line.endswith(
        ": --effective_batch_size 6: not a multiple of the 4 processes. Use 4, or another "
        "number of processes."
    )


def kill_rank(process: "subprocess.Popen[bytes]", rank: int, checkpoint: Path) -> None:
    """Kill a rank of a run once it has written a checkpoint newer than the present one."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    deadline = time.monotonic() + LIMIT
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "nothing was saved"
        assert process.poll() is None, "ended before anything was saved"
        time.sleep(0.05)
    os.kill(pid_of_rank(process.pid, rank), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_or_starts_it_again(shapes: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "run", tmp_path / "out.txt"
    options = ("train", "--config", TINY, "--coco_path", shapes, "--output_dir", folder,
               "--gpus", "2", "--batch_size", "2", "--epochs", "15", "--eval_every", "15",
               "--save_every", "5", "--resume", "auto", "--no_tensorboard")  # fmt: skip
    process = start(output, *options)
    kill_rank(process, 1, folder / "last.pth")
    killed = time.monotonic()
    assert end(process) == 128 + signal.SIGKILL, lines(output)
    assert time.monotonic() - killed < 60
    assert lines(output)[-1].startswith("error: rank 1: killed by SIGKILL")

    process = start(output, *options, "--max_restarts", "1")
    kill_rank(process, 0, folder / "last.pth")
    assert end(process) == 0, lines(output)
    resumed = [int(x.rsplit(" ", 1)[1]) for x in lines(output) if x.startswith("resuming at")]
    assert len(resumed) == 2
    assert 0 < resumed[0] < resumed[1] < 60
    assert [line["step"] for line in metrics(folder)] == list(range(60))
    assert [line["epoch"] for line in read_log(folder)] == list(range(15))
