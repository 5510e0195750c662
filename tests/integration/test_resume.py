"""What `--resume` continues from, what it refuses, and how a damaged checkpoint is passed over."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from main import main
from tests.integration.conftest import TINY, Cli, read_log
from tests.integration.runs import Command, assert_same_runs, errors, metrics, state_of

Options = tuple[str | Path, ...]


def test_a_run_stopped_in_an_epoch_ends_like_the_uninterrupted_one(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = cli("train", "--config", TINY, "--coco_path", shapes, "--output_dir", run,
                  "--max_steps", "6")  # fmt: skip
    assert started.returncode == 0, started.stderr
    resumed = cli("train", "--resume", run / "last.pth", "--max_steps", "0")
    assert resumed.returncode == 0, resumed.stderr
    weights, expected = (state_of(r / "last.pth")["model"] for r in (run, finished_run))
    assert all(weights[key].equal(expected[key]) for key in expected)
    results = [read_log(r)[-1]["test_coco_eval_bbox"] for r in (run, finished_run)]
    assert results[0] == results[1]
    assert [line["epoch"] for line in read_log(run)] == [0, 1]


def test_auto_begins_a_new_run_where_there_is_none(
    reference: Path, reference_options: Options, tmp_path: Path
) -> None:
    Command(tmp_path / "run", (*reference_options, "--resume", "auto")).run()
    assert_same_runs(tmp_path / "run", reference)


@pytest.fixture(scope="module")
def stopped_run(reference_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps of 12, with the checkpoints of steps 4, 5 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    Command(folder, (*reference_options, "--max_steps", "6")).run()
    found = sorted(path.name for path in folder.glob("*.pth"))
    assert found == ["best.pth", "last.pth", "step_00000004.pth", "step_00000005.pth"]
    return folder


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # nine tenths of a checkpoint are tensors
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_byte])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    stopped_run: Path, reference: Path, reference_options: Options, tmp_path: Path, damage: object
) -> None:
    folder = Path(shutil.copytree(stopped_run, tmp_path / "run"))
    assert callable(damage)
    damage(folder / "last.pth")
    output = Command(folder, (*reference_options, "--max_steps", "0")).run("--resume", "auto")
    warnings = [line for line in output.splitlines() if "warning" in line]
    assert len(warnings) == 1, warnings
    assert str(folder / "last.pth") in warnings[0]
    assert "step 5" in output
    assert_same_runs(folder, reference)
    assert [line["step"] for line in metrics(folder)] == list(range(12))


def test_a_folder_of_damaged_checkpoints_is_a_one_line_error(
    stopped_run: Path, reference_options: Options, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped_run, tmp_path / "run"))
    for path in (*folder.glob("step_*.pth"), folder / "last.pth"):
        cut_in_half(path)
    output = Command(folder, reference_options).run("--resume", "auto", code=2)
    assert len(errors(output)) == 1
    assert "all 3 checkpoints are damaged" in errors(output)[0]
    assert "Traceback" not in output


def one_value(content: Any) -> None:
    for moments in content["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(1)


def not_a_number(content: Any) -> None:
    content["model"]["transformer.level_embed"][0, 0] = math.nan


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(one_value, "exp_avg, is (1,)"), (not_a_number, "'transformer.level_embed' are not finite")],
)
def test_a_state_that_no_run_could_have_saved_is_a_one_line_error(
    finished_run: Path, shapes: Path, tmp_path: Path, spoil: Callable[[Any], None], words: str
) -> None:
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    content = torch.load(folder / "last.pth", weights_only=True)
    spoil(content)
    torch.save(content, folder / "last.pth")
    before = (folder / "last.pth").read_bytes()
    options = ("--coco_path", shapes, "--resume", folder / "last.pth", "--epochs", "9")
    command = Command(folder, options)
    (line,) = errors(command.run(code=2))
    assert f"{folder / 'last.pth'}: cannot be resumed: " in line
    assert words in line
    assert (folder / "last.pth").read_bytes() == before


def test_resuming_another_model_names_the_options(finished_run: Path, tmp_path: Path) -> None:
    output = Command(tmp_path / "run", ("--resume", finished_run / "last.pth",
                                        "--num_queries", "33")).run(code=2)  # fmt: skip
    assert "--num_queries: checkpoint 20, run 33" in errors(output)[0]


@pytest.mark.slow
def test_a_resumed_run_obeys_a_new_learning_rate(shapes: Path, tmp_path: Path) -> None:
    command = Command(tmp_path / "run", ("--coco_path", shapes, "--lr_scheduler", "step",
                                         "--warmup_steps", "0"))  # fmt: skip
    command.run("--max_steps", "2")
    command.run("--resume", "auto", "--lr", "3e-5", "--max_steps", "4")
    rates = [line["lr_transformer"] for line in metrics(command.folder)]
    assert rates == [2e-3, 2e-3, 3e-5, 3e-5]


def test_resuming_on_other_classes_is_refused(
    finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    for split in ("train", "val"):
        file = data / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = "dodecahedron"
        file.write_text(json.dumps(content))
    output = Command(tmp_path / "run", ("--coco_path", data, "--epochs", "9", "--resume",
                                        finished_run / "last.pth")).run(code=2)  # fmt: skip
    assert "classes" in errors(output)[0]
    assert "--finetune" in errors(output)[0]


def test_resuming_a_finished_run_changes_nothing(
    reference: Path, reference_options: Options
) -> None:
    before = {path.name: path.read_bytes() for path in reference.iterdir() if path.is_file()}
    output = Command(reference, reference_options).run("--resume", "auto")
    assert "this run is finished" in output
    after = {path.name: path.read_bytes() for path in reference.iterdir() if path.is_file()}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name != "config.yaml")


@pytest.mark.slow
def test_unreadable_images_of_before_stay_listed(shapes: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    first, second = sorted((data / "train2017").iterdir())[:2]
    whole = first.read_bytes()
    cut_in_half(first)
    command = Command(tmp_path / "run", ("--coco_path", data, "--resume", "auto"))
    command.run("--epochs", "1")
    report = command.folder / "data_report.json"
    before = report.read_text()
    command.run("--epochs", "1")  # finished: nothing is trained
    assert report.read_text() == before
    first.write_bytes(whole)
    cut_in_half(second)
    command.run("--epochs", "2")
    listed = json.loads(report.read_text())["train"]["unreadable_in_training"]
    assert [image["path"] for image in listed] == [str(first), str(second)]
    assert [line["train_unreadable_images"] for line in read_log(command.folder)] == [1, 2]


def test_a_folder_with_a_run_is_not_overwritten(
    reference: Path, reference_options: Options
) -> None:
    output = Command(reference, reference_options).run(code=2)
    assert "--resume auto" in errors(output)[0]


@pytest.mark.slow
def test_resuming_a_fine_tuned_run_keeps_its_preprocessing_and_needs_no_download(
    finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    source = torch.load(finished_run / "last.pth", weights_only=True)
    source["preprocessing"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save(source, tmp_path / "source.pth")
    command = Command(tmp_path / "run", ("--coco_path", shapes, "--finetune",
                                         tmp_path / "source.pth", "--backbone_weights",
                                         "imagenet"))  # fmt: skip
    command.run("--max_steps", "1")
    command.run("--resume", "auto", "--max_steps", "2")
    assert state_of(command.folder / "last.pth")["preprocessing"] == source["preprocessing"]


def test_a_restart_by_the_launcher_continues_from_the_same_checkpoint(
    finished_run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From --resume FILE before anything new is saved; from its own checkpoint with --finetune."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    moved = Path(shutil.copytree(finished_run, tmp_path / "moved"))
    steps = len(metrics(finished_run))
    more = ["--epochs", "3", "--max_steps", str(steps + 1), "--no_probe"]
    assert main(["train", "--resume", str(moved / "last.pth"), *more]) == 0
    assert [len(metrics(folder)) for folder in (moved, finished_run)] == [steps + 1, steps]
    new = tmp_path / "new"
    source = str(finished_run / "last.pth")
    assert main(["train", "--resume", source, "--output_dir", str(new), *more]) == 0
    assert [line["step"] for line in metrics(new)] == [steps]
    tuned = ["--config", TINY, "--coco_path", str(shapes), "--no_probe"]
    tuned += ["--finetune", source, "--output_dir", str(tmp_path / "tuned")]
    for last in ("1", "2"):
        assert main(["train", *tuned, "--max_steps", last]) == 0
    assert [line["step"] for line in metrics(tmp_path / "tuned")] == [0, 1]
