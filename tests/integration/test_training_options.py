"""Options of precision, memory and speed: what they change, and what they may not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import TINY, Cli
from tests.integration.runs import (
    Command,
    assert_same,
    assert_same_runs,
    errors,
    lines,
    metrics,
    start,
    state_of,
)

Options = tuple[str | Path, ...]


def losses(folder: Path) -> list[float]:
    """Return the loss of each step."""
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.slow
def test_bfloat16_trains_near_float32(
    reference: Path, reference_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    Command(folder, (*reference_options, "--precision", "bf16")).run("--max_steps", "4")
    found, expected = losses(folder), losses(reference)[:4]
    assert found == pytest.approx(expected, rel=0.03)
    assert found != expected


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_a_precision_that_the_cpu_lacks_is_refused(
    reference_options: Options, tmp_path: Path, precision: str
) -> None:
    command = Command(tmp_path / "run", (*reference_options, "--device", "cpu"))
    output = command.run("--precision", precision, code=2)
    assert len(errors(output)) == 1
    assert f"--precision {precision}" in errors(output)[0]
    assert "Traceback" not in output


def test_activation_checkpointing_changes_no_bit(
    reference: Path, reference_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    parts = ("--activation_checkpointing", "encoder", "decoder", "backbone")
    output = Command(folder, (*reference_options, *parts, "--no_probe")).run()
    assert "largest step" not in output
    assert_same_runs(folder, reference)


def test_deterministic_runs_are_equal(reference_options: Options, tmp_path: Path) -> None:
    runs = [Command(tmp_path / name, (*reference_options, "--deterministic")) for name in "ab"]
    for run in runs:
        run.run("--max_steps", "3")
    assert_same_runs(runs[0].folder, runs[1].folder)


def evaluated(reference: Path, shapes: Path, folder: Path, *more: str) -> Any:
    """Evaluate a run's last checkpoint; return the detections."""
    running = start(folder.with_suffix(".output"), "eval", "--checkpoint", reference / "last.pth",
                    "--coco_path", shapes, "--num_workers", "0", "--output_dir", folder,
                    *more)  # fmt: skip
    assert running.end() == 0, running.output
    return json.loads((folder / "eval" / "detections.json").read_text())


@pytest.mark.slow
def test_evaluation_uses_the_averages_by_default(
    reference: Path, shapes: Path, tmp_path: Path
) -> None:
    of_the_run = json.loads((reference / "eval" / "detections.json").read_text())
    averaged = evaluated(reference, shapes, tmp_path / "averaged")
    own = evaluated(reference, shapes, tmp_path / "own", "--no_ema")
    assert averaged == of_the_run  # whose last evaluation is that of the averages
    assert own != averaged


def test_the_best_checkpoint_is_that_of_the_averages(reference: Path) -> None:
    epochs = [json.loads(line) for line in (reference / "log.txt").open()]
    scores = [epoch["ema_test_coco_eval_bbox"][0] for epoch in epochs]
    best = state_of(reference / "best.pth")
    assert best["best"]["AP"] == max(scores)
    assert best["best"]["epoch"] == best["epoch"] == scores.index(max(scores))
    last = state_of(reference / "last.pth")
    assert_same(last["best"], best["best"], "best")
    assert any(not last["ema"]["model"][k].equal(last["model"][k]) for k in last["model"])


def test_the_time_of_each_step_is_logged_in_parts(reference: Path) -> None:
    parts = ("time_data", "time_forward", "time_match", "time_backward", "time_optimiser")
    for line in metrics(reference):
        assert all(line[part] >= 0 for part in parts)
        assert line["time"] == pytest.approx(sum(line[part] for part in parts))
        assert line["time"] > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_as_one_that_is_not(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    small = ("--coco_path", shapes, "--max_steps", "2", "--pad_multiple", "96", "--no_probe",
             "--num_images", "0", "--dec_layers", "1")  # fmt: skip
    plain, compiled = Command(tmp_path / "plain", small), tmp_path / "compiled"
    plain.run()
    done = cli("train", "--config", TINY, "--output_dir", compiled, *small, "--compile")
    assert done.returncode == 0, done.stderr
    assert losses(compiled) == pytest.approx(losses(plain.folder), rel=1e-4)


def test_a_run_stops_when_ap_has_not_risen_and_goes_on_with_more_patience(
    shapes: Path, tmp_path: Path
) -> None:
    still = ("--coco_path", shapes, "--epochs", "9", "--lr", "1e-12", "--lr_backbone", "0",
             "--weight_decay", "0", "--no_probe", "--no_tensorboard")  # fmt: skip
    command = Command(tmp_path / "run", (*still, "--resume", "auto"))
    output = command.run("--patience", "2")
    assert "AP has not risen for `patience 2` since epoch 1" in output
    assert len(lines(tmp_path / "run" / "log.txt")) == 3
    assert state_of(tmp_path / "run" / "best.pth")["epoch"] == 0
    command.run("--patience", "2")  # finished: nothing is trained
    assert len(lines(tmp_path / "run" / "log.txt")) == 3
    command.run("--patience", "3")
    Command(tmp_path / "whole", still).run("--patience", "3")
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    assert len(lines(tmp_path / "run" / "log.txt")) == 4


def test_only_evaluated_epochs_exhaust_patience(shapes: Path, tmp_path: Path) -> None:
    still = ("--coco_path", shapes, "--epochs", "9", "--lr", "1e-12", "--lr_backbone", "0",
             "--weight_decay", "0", "--no_probe", "--no_tensorboard")  # fmt: skip
    Command(tmp_path / "run", still).run("--patience", "1", "--eval_every", "2")
    evaluated = ["test_coco_eval_bbox" in line for line in lines(tmp_path / "run" / "log.txt")]
    assert evaluated == [False, True, False, True]


def test_a_run_without_validation_data_needs_none(shapes: Path, tmp_path: Path) -> None:
    data = ("--train_images", shapes / "train2017", "--train_annotations",
            shapes / "annotations" / "instances_train2017.json", "--no_probe")  # fmt: skip
    command = Command(tmp_path / "run", data)
    assert len(errors(command.run(code=2))) == 1
    assert "needs the AP" in command.run("--no_validate", "--patience", "3", code=2)
    command.run("--no_validate")
    entries = lines(tmp_path / "run" / "log.txt")
    assert len(entries) == 2
    assert not any("test" in key for entry in entries for key in entry)
    assert (tmp_path / "run" / "last.pth").exists()
    assert not (tmp_path / "run" / "best.pth").exists()
    Command(tmp_path / "with", ("--coco_path", shapes, "--no_probe")).run()
    found, expected = (state_of(tmp_path / name / "last.pth") for name in ("run", "with"))
    assert_same(found["model"], expected["model"], "model")
    assert found["thresholds"] == {}


def test_a_share_of_the_validation_images_is_evaluated(shapes: Path, tmp_path: Path) -> None:
    options = ("--coco_path", shapes, "--epochs", "1", "--no_probe", "--no_tensorboard")
    output = Command(tmp_path / "run", (*options, "--val_share", "0.4")).run()
    assert "evaluating on 3 of the 7 validation images" in output
    found = json.loads((tmp_path / "run" / "eval" / "detections.json").read_text())
    truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    ids = sorted(image["id"] for image in truth["images"])
    assert {entry["image_id"] for entry in found} == {ids[0], ids[3], ids[6]}
    result = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    boxes = [a for a in truth["annotations"] if a["image_id"] in (ids[0], ids[3], ids[6])]
    assert sum(c["num_boxes"] for c in result["per_class"]) == len(boxes)
