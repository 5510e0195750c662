"""A run that stops can be continued, and ends as if it had not stopped."""

import json
import os
import shutil
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


def test_a_resumed_run_obeys_a_new_learning_rate(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = cli("train", "--config", TINY, "--coco_path", shapes, "--output_dir", run,
                  "--max_steps", "2", "--lr_scheduler", "step", "--warmup_steps", "0")  # fmt: skip
    assert started.returncode == 0, started.stderr
    resumed = cli("train", "--resume", run / "last.pth", "--lr", "3e-5", "--max_steps", "4")
    assert resumed.returncode == 0, resumed.stderr
    rates = [json.loads(x)["lr_transformer"] for x in (run / "metrics.jsonl").open()]
    assert rates == [2e-3, 2e-3, 3e-5, 3e-5]


def test_resuming_on_other_classes_is_refused(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    for split in ("train", "val"):
        file = data / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = "dodecahedron"
        file.write_text(json.dumps(content))
    done = cli("train", "--resume", finished_run / "last.pth", "--coco_path", data,
               "--epochs", "9", "--output_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 2
    assert "classes" in done.stderr
    assert "--finetune" in done.stderr


def test_resuming_a_finished_run_changes_nothing(cli: Cli, finished_run: Path) -> None:
    before = (finished_run / "log.txt").read_text()
    done = cli("train", "--resume", finished_run / "last.pth")
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert (finished_run / "log.txt").read_text() == before


def test_resuming_a_fine_tuned_run_keeps_its_preprocessing_and_needs_no_download(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    source = torch.load(finished_run / "last.pth", weights_only=True)
    source["preprocessing"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save(source, tmp_path / "source.pth")
    run = tmp_path / "run"
    started = cli("train", "--config", TINY, "--coco_path", shapes, "--output_dir", run,
                  "--finetune", tmp_path / "source.pth", "--max_steps", "1",
                  "--backbone_weights", "imagenet")  # fmt: skip
    assert started.returncode == 0, started.stderr
    resumed = cli("train", "--resume", run / "last.pth", "--max_steps", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert (
        torch.load(run / "last.pth", weights_only=True)["preprocessing"]
        == (source["preprocessing"])
    )
