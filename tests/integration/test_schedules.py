"""Schedules, averages and time limits through the command line; interrupted and not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.optim import Schedule
from tests.integration.conftest import Cli, read_log
from tests.integration.runs import Command, assert_same_runs, errors, metrics, state_of

Options = tuple[str | Path, ...]
FLAT = Schedule(kind="flat_cosine", epochs=2, flat=0.5, tail=0.2, final=0.1, warmup_steps=3,
                warmup_shape="quadratic")  # fmt: skip


@pytest.fixture(scope="module")
def timed_options(shapes: Path) -> Options:
    """The options of a run with all that depends on its length."""
    return ("--coco_path", shapes, "--max_hours", "0.0015", "--lr_scheduler", "flat_cosine",
            "--lr_tail", "0.2", "--lr_final", "0.1", "--warmup_steps", "3", "--warmup_shape",
            "quadratic", "--ema_decay", "0.9", "--ema_tau", "5", "--norm_weight_decay", "0",
            "--dropout", "0.1", "--mosaic", "0.5", "--close_augment_epochs", "2", "--eval_every",
            "1000", "--save_every", "1", "--keep_checkpoints", "1000", "--no_tensorboard",
            "--num_workers", "1")  # fmt: skip


@pytest.fixture(scope="module")
def timed_run(timed_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("runs") / "timed"
    Command(folder, timed_options).run()
    return folder


def length_of(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "last.pth", weights_only=True)
    length: dict[str, Any] = content["progress"]["time_limit"]["length"]
    return length


def test_the_schedule_covers_the_run_that_the_time_allows(timed_run: Path) -> None:
    length = length_of(timed_run)
    steps, decided_at = length["steps"], length["decided_at"]
    lines = metrics(timed_run)
    assert [line["step"] for line in lines] == list(range(steps))
    expected = [FLAT.over(None if t < decided_at else steps)(t) * 2e-3 for t in range(steps)]
    assert [line["lr_transformer"] for line in lines] == pytest.approx(expected)
    assert [line["lr_transformer_norms"] for line in lines] == pytest.approx(expected)
    assert read_log(timed_run)[-1]["total_steps"] == steps
    assert read_log(timed_run)[-1]["epoch"] == (steps - 1) // 4


def test_a_killed_run_keeps_its_length_and_ends_as_the_uninterrupted_one(
    timed_run: Path, timed_options: Options, tmp_path: Path
) -> None:
    length = length_of(timed_run)
    begin = length["decided_at"] + 1
    assert begin + 3 < length["steps"], length
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(timed_run / f"step_{begin:08d}.pth", folder / "last.pth")
    for name in ("metrics.jsonl", "log.txt", "data_report.json"):
        shutil.copy(timed_run / name, folder)
    command = Command(folder, (*timed_options, "--resume", "auto"))
    running = command.start()
    running.wait_until(
        lambda: (
            "resuming" in running.output
            and state_of(folder / "last.pth")["progress"]["step"] >= begin + 2
        )
    )
    running.kill()
    command.run()
    assert length_of(folder) == length
    assert_same_runs(folder, timed_run)


def test_other_hours_move_the_end_of_a_finished_run(
    timed_run: Path, timed_options: Options, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(timed_run, tmp_path / "run"))
    before = length_of(folder)
    again = Command(folder, (*timed_options, "--resume", "auto"))
    assert "Raise --max_hours or --max_steps" in again.run()
    again.run("--max_hours", "0.0018")
    after = length_of(folder)
    assert after["steps"] > before["steps"]
    assert {**after, "steps": 0} == {**before, "steps": 0}
    assert len(metrics(folder)) == after["steps"]


def test_another_weight_decay_of_norms_is_refused_on_resume(
    timed_run: Path, shapes: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "run", ("--coco_path", shapes, "--resume", timed_run / "last.pth",
                                         "--norm_weight_decay", "none"))  # fmt: skip
    (line,) = errors(command.run(code=2))
    assert "--norm_weight_decay: checkpoint its own, run as weight_decay" in line


@pytest.mark.slow
def test_processes_agree_on_the_length_and_one_continues_what_two_began(
    shapes: Path, tmp_path: Path
) -> None:
    options = ("--coco_path", shapes, "--max_hours", "0.002", "--lr_scheduler", "cosine",
               "--effective_batch_size", "4", "--batch_size", "2", "--eval_every", "1000",
               "--save_every", "1", "--keep_checkpoints", "1000", "--no_tensorboard",
               "--num_workers", "0", "--device", "cpu")  # fmt: skip
    two = Command(tmp_path / "two", (*options, "--gpus", "2"))
    two.run()
    length = length_of(two.folder)
    assert len(metrics(two.folder)) == length["steps"]
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(two.folder / f"step_{length['decided_at']:08d}.pth", one / "last.pth")
    shutil.copy(two.folder / "metrics.jsonl", one)
    Command(one, options).run("--resume", "auto", "--gpus", "1")
    assert length_of(one) == length
    rates, losses = (
        [[line[key] for line in metrics(folder)] for folder in (one, two.folder)]
        for key in ("lr_transformer", "loss")
    )
    assert rates[0] == rates[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("ema", [True, False])
def test_an_average_is_the_mean_of_the_last_checkpoints_and_is_measured_as_any_other(
    cli: Cli, reference: Path, shapes: Path, tmp_path: Path, ema: bool
) -> None:
    switch = () if ema else ("--no_ema",)
    output = tmp_path / "mean.pth"
    done = cli("average", "--output_dir", reference, "--last", "3", "--output", output, *switch)
    assert done.returncode == 0, done.stderr
    assert "the mean of 3 checkpoints (steps 10, 11, 12)" in done.stdout
    files = [reference / f"{name}.pth" for name in ("step_00000010", "step_00000011", "last")]
    contents = [torch.load(file, weights_only=True) for file in files]
    states = [(c["ema"] if ema else c)["model"] for c in contents]
    mean = torch.load(output, weights_only=True)
    for name, value in mean["model"].items():
        if value.is_floating_point():
            expected = np.mean([s[name].double().numpy() for s in states], axis=0)
            assert value.equal(torch.from_numpy(expected).float()), name
        else:
            assert value.equal(states[-1][name]), name
    named = tmp_path / "named.pth"
    done = cli("average", "--checkpoints", *reversed(files), "--output", named, *switch)
    assert done.returncode == 0, done.stderr
    again = torch.load(named, weights_only=True)["model"]
    assert all(value.equal(again[name]) for name, value in mean["model"].items())
    measured = cli("eval", "--checkpoint", output, "--coco_path", shapes, "--no_analysis")
    assert measured.returncode == 0, measured.stderr
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert 0 <= results["AP"] <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--checkpoints", "{a}/last.pth", "{b}/last.pth", "--output", "{out}"),
         "of another model than the other checkpoints (--dropout"),
        (("--checkpoints", "{a}/last.pth", "{a}/last.pth", "--output", "{out}"), "at least two"),
        (("--output_dir", "{b}", "--last", "9"), "--keep_checkpoints 9"),
        (("--output_dir", "{b}", "--last", "2", "--output", "{b}/last.pth"), "overwritten"),
        (("--checkpoints", "{a}/last.pth", "{out}", "--output", "{out}2"), "no such file"),
        (("--checkpoints", "{a}/last.pth"), "--output: is missing"),
        ((), "give either --checkpoints"),
    ],
)  # fmt: skip
def test_what_cannot_be_averaged_is_one_line(
    cli: Cli, finished_run: Path, reference: Path, tmp_path: Path,
    arguments: tuple[str, ...], words: str,
) -> None:  # fmt: skip
    places = {"a": finished_run, "b": reference, "out": tmp_path / "mean.pth"}
    done = cli("average", *(a.format(**places) for a in arguments))
    assert done.returncode == 2, done.stderr
    (line,) = errors(done.stderr)
    assert words in line
    assert not (tmp_path / "mean.pth").exists()


def detections_per_image(file: Path) -> int:
    """Return the most that an image has."""
    images = [entry["image_id"] for entry in json.loads(file.read_text())]
    return max(map(images.count, images))


def test_the_number_of_detections_kept_is_that_asked_for(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    assert detections_per_image(finished_run / "eval" / "detections.json") == 60  # 20 x 3 classes
    trained = cli("train", "--resume", finished_run / "last.pth", "--output_dir", tmp_path / "run",
                  "--epochs", "3", "--max_steps", "9", "--num_select", "7")  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert detections_per_image(tmp_path / "run" / "eval" / "detections.json") == 7
    for checkpoint, options, expected in (
        (finished_run, ("--num_select", "5"), 5),
        (tmp_path / "run", (), 7),
    ):
        output = tmp_path / str(expected)
        source = checkpoint / "last.pth"
        done = cli("eval", "--checkpoint", source, "--coco_path", shapes, "--output_dir", output,
                   "--no_analysis", *options)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert detections_per_image(output / "eval" / "detections.json") == expected
        done = cli("predict", "--checkpoint", source, "--input", shapes / "val2017", "--output_dir",
                   output, *options)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert detections_per_image(output / "predictions.json") == expected
