"""`plan` and `train --config auto` through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datasets.shapes import generate_shapes
from tests.integration.conftest import Cli
from tests.integration.runs import Command, assert_same, errors, metrics

# A network that takes a moment; all else is left to the plan.
SMALL = ("--backbone", "timm/test_resnet", "--hidden_dim", "32", "--nheads", "2",
         "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "64",
         "--backbone_weights", "none", "--device", "cpu", "--num_workers", "0")  # fmt: skip
QUICK = (*SMALL, "--config", "auto", "--no_tensorboard", "--num_images", "0")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 8 training and 2 validation images with many small boxes."""
    folder = tmp_path_factory.mktemp("data") / "crowded"
    generate_shapes(folder, num_train=8, num_val=2, seed=0, scene="crowded")
    return folder


@pytest.fixture(scope="module")
def planned_run(crowded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the first two steps of a planned run."""
    folder = tmp_path_factory.mktemp("runs") / "planned"
    output = Command(folder, ("--coco_path", crowded, "--max_hours", "1", *QUICK)).run(
        "--max_steps", "2"
    )
    assert "measuring a few steps" in output
    return folder


def boxes_of(folder: Path) -> list[dict[str, Any]]:
    """Return the training annotations of a generated set."""
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    annotations: list[dict[str, Any]] = content["annotations"]
    return annotations


def options_of(file: Path) -> dict[str, Any]:
    """Return the options in a file by name."""
    content = yaml.safe_load(file.read_text())
    return {name: value for entries in content.values() for name, value in entries.items()}


@pytest.mark.long
def test_a_planned_run_sees_small_boxes_and_saves_an_ordinary_file(
    crowded: Path, planned_run: Path
) -> None:
    boxes = boxes_of(crowded)
    sides = sorted((b["bbox"][2] * b["bbox"][3]) ** 0.5 for b in boxes)
    most = max(sum(b["image_id"] == i for b in boxes) for i in {b["image_id"] for b in boxes})
    options = options_of(planned_run / "config.yaml")
    scale = options["eval_scale"] / 480
    assert sides[len(sides) // 10 + 1] * scale >= 16
    assert min(options["train_scales"]) >= 0.85 * options["eval_scale"]
    assert options["num_queries"] >= 1.5 * most
    assert (options["max_hours"], options["hidden_dim"]) == (1.0, 32)
    assert len(metrics(planned_run)) == 2
    record = json.loads((planned_run / "plan.json").read_text())
    assert record["basis"]["facts"]["most_boxes"] == most
    assert all(trial["seconds"] > 0 for trial in record["measured"]["trials"])


@pytest.mark.slow
def test_the_saved_file_runs_the_same_and_a_resumed_run_measures_nothing(
    crowded: Path, planned_run: Path, tmp_path: Path
) -> None:
    """One is started from the plan's file and not interrupted, the other is resumed."""
    whole = Command(tmp_path / "whole", ("--num_images", "0"))
    output = whole.run("--config", planned_run / "config.yaml", "--max_steps", "4")
    assert "plan:" not in output
    resumed = Command(tmp_path / "resumed", ("--coco_path", crowded, "--max_hours", "1", *QUICK))
    shutil.copytree(planned_run, resumed.folder)
    output = resumed.run("--resume", "auto", "--max_steps", "4")
    assert "resuming at epoch 1, step 2" in output or "resuming at epoch 2, step 2" in output
    assert "plan:" not in output
    contents = [torch.load(c.folder / "last.pth", weights_only=True) for c in (whole, resumed)]
    for part in ("model", "optimizer", "lr_scheduler"):
        assert_same(contents[0][part], contents[1][part], part)
    losses = [[line["loss"] for line in metrics(c.folder)] for c in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_a_start_that_came_to_nothing_is_repeated_with_what_it_measured(
    crowded: Path, planned_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    shutil.copy(planned_run / "plan.json", folder)
    again = Command(folder, ("--coco_path", crowded, "--max_hours", "1", *QUICK))
    output = again.run("--max_steps", "1")
    assert "plan:" in output
    assert "measuring" not in output
    before, after = (json.loads((f / "plan.json").read_text()) for f in (planned_run, folder))
    assert before == after
    found, expected = options_of(folder / "config.yaml"), options_of(planned_run / "config.yaml")
    assert {k for k in found if found[k] != expected[k]} == {"output_dir", "max_steps"}


@pytest.mark.long
def test_given_options_win_and_are_named(cli: Cli, crowded: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: auto\nmodel: {num_queries: 20}\n")
    done = cli("plan", *SMALL, "--config", file, "--coco_path", crowded, "--epochs", "3",
               "--eval_scale", "64", "--num_denoising", "5", "--output",
               tmp_path / "plan.yaml")  # fmt: skip
    assert done.returncode == 0, done.stderr
    options = options_of(tmp_path / "plan.yaml")
    assert (options["num_queries"], options["eval_scale"], options["epochs"]) == (20, 64, 3)
    assert options["denoising"] == {**options["denoising"], "num_denoising": 5}
    for words in ("num_queries 20 (given)", "eval_scale 64 (given)", "epochs 3 (given)",
                  "recipes denoising (given)"):  # fmt: skip
        assert words in done.stdout
    assert "warning: one box in ten is smaller than" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "plan.yaml"]
    done = cli("plan", "--output", tmp_path / "plan.yaml", "--max_hours", "1")
    assert done.returncode == 2
    assert "the file exists" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("to", ["yolo", "voc"])
def test_the_plan_is_that_of_the_data_whatever_its_format(
    cli: Cli, crowded: Path, planned_run: Path, tmp_path: Path, to: str
) -> None:
    folder = tmp_path / to
    done = cli("convert", "--data_path", crowded, "--to", to, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    done = cli("plan", *SMALL, "--data_path", folder, "--max_hours", "1", "--output",
               tmp_path / "plan.yaml")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, expected = options_of(tmp_path / "plan.yaml"), options_of(planned_run / "config.yaml")
    for name in ("eval_scale", "max_size", "train_scales", "num_queries", "num_feature_levels"):
        assert found[name] == expected[name], name


@pytest.mark.slow
def test_processes_have_one_plan(crowded: Path, tmp_path: Path) -> None:
    two = Command(tmp_path / "two", ("--coco_path", crowded, "--max_hours", "1", *QUICK))
    output = two.run("--gpus", "2", "--max_steps", "1", "--save_every", "1")
    assert output.count("measuring a few steps") == 1
    options = options_of(two.folder / "config.yaml")
    assert (options["batch_size"], options["effective_batch_size"]) == (2, 4)
    assert len(metrics(two.folder)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan",), "--max_hours: is missing"),
        (("plan", "--max_hours", "1"), "train data: no option says where it is"),
        (("plan", "--max_hours", "1", "--resume", "auto"), "--resume: a resumed run keeps"),
        (("plan", "--max_hours", "1", "--coco_path", "{data}", "--hidden_dim", "100"),
         "--hidden_dim"),
        (("train", "--config", "auto", "--output_dir", "{out}"), "--max_hours: is missing"),
        (("train", "--config", "auto", "--max_hours", "1"), "--output_dir: is missing"),
        (("check", "--config", "auto"), "--config auto: works with `train` and `plan` only"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(
    cli: Cli, crowded: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    places = {"data": crowded, "out": tmp_path / "run"}
    done = cli(*(a.format(**places) for a in arguments))
    assert done.returncode == 2, done.stderr
    (line,) = errors(done.stderr)
    assert words in line


@pytest.mark.slow
def test_the_number_format_is_chosen_once_in_a_run(crowded: Path, tmp_path: Path) -> None:
    command = Command(
        tmp_path / "run",
        ("--coco_path", crowded, *SMALL, "--precision", "auto", "--resume", "auto"),
    )
    output = command.run("--max_steps", "1")
    chosen = options_of(command.folder / "config.yaml")["precision"]
    assert f"precision auto: {chosen} (a step of one image: fp32 " in output
    command.run("--max_steps", "2", "--precision", other := {"fp32": "bf16"}.get(chosen, "fp32"))
    output = command.run("--max_steps", "3")
    assert "precision auto" not in output
    assert options_of(command.folder / "config.yaml")["precision"] == other
