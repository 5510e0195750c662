"""Schedules, averages and time limits through the command line; interrupted and not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.optim import Schedule
from engine.time_limit import Costs, Rhythm
from tests.integration.conftest import Cli, read_log
from tests.integration.runs import Command, assert_same_runs, errors, metrics, state_of

Options = tuple[str | Path, ...]
FLAT = Schedule(kind="flat_cosine", epochs=2, flat=0.0, tail=0.2, final=0.1, warmup_steps=3,
                warmup_shape="quadratic")  # fmt: skip
STEPS = 28  # seven epochs: the steps that are timed end before, as they take 0.36 s together


@pytest.fixture(scope="module")
def timed_options(shapes: Path) -> Options:
    """The options of a run with all that depends on its length."""
    return ("--coco_path", shapes, "--lr_scheduler", "flat_cosine", "--lr_flat", "0", "--lr_tail",
            "0.2", "--lr_final", "0.1", "--warmup_steps", "3", "--warmup_shape", "quadratic",
            "--ema_decay", "0.9", "--ema_tau", "5", "--norm_weight_decay", "0", "--dropout", "0.1",
            "--mosaic", "0.5", "--close_augment_epochs", "2", "--eval_every", "1000",
            "--save_every", "2", "--no_tensorboard", "--num_workers", "1")  # fmt: skip


@pytest.fixture(scope="module")
def timed_run(timed_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the beginning of such a run, of 18 seconds if `max_steps` did not end it."""
    folder = tmp_path_factory.mktemp("runs") / "timed"
    Command(folder, (*timed_options, "--max_hours", "0.005", "--max_steps", str(STEPS))).run()
    return folder


@pytest.fixture(scope="module")
def other_hours(timed_run: Path) -> str:
    """The hours in which, with what was measured, ten more steps fit; on any machine."""
    length = length_of(timed_run)
    costs, rhythm = Costs(**length["costs"]), Rhythm(4, 1000, 2)
    total = len(metrics(timed_run)) + 10
    seconds = costs.between(length["decided_at"], total, rhythm, ending=True)
    return repr((length["used"] + seconds + costs.step / 2) / 3600)


@pytest.fixture(scope="module")
def continued(
    timed_run: Path, timed_options: Options, other_hours: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """The folder of the same run, continued to the end of these hours."""
    folder = tmp_path_factory.mktemp("runs") / "continued"
    shutil.copytree(timed_run, folder)
    Command(folder, (*timed_options, "--resume", "auto", "--max_hours", other_hours)).run(
        "--max_steps", "0"
    )
    return folder


def length_of(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "last.pth", weights_only=True)
    length: dict[str, Any] = content["progress"]["time_limit"]["length"]
    return length


@pytest.mark.slow
def test_the_schedule_covers_the_run_that_the_time_allows(timed_run: Path) -> None:
    length = length_of(timed_run)
    steps, decided_at = length["steps"], length["decided_at"]
    lines = metrics(timed_run)
    made = range(min(steps, STEPS))
    assert [line["step"] for line in lines] == list(made)
    expected = [FLAT.over(None if t < decided_at else steps)(t) * 2e-3 for t in made]
    assert [line["lr_transformer"] for line in lines] == pytest.approx(expected)
    assert [line["lr_transformer_norms"] for line in lines] == pytest.approx(expected)
    assert read_log(timed_run)[-1]["total_steps"] == steps


@pytest.mark.slow
def test_other_hours_move_the_end_by_what_was_measured(
    timed_run: Path, continued: Path, timed_options: Options, tmp_path: Path, other_hours: str
) -> None:
    made = len(metrics(timed_run))
    steps = made + 10
    assert length_of(continued) == {**length_of(timed_run), "steps": steps}
    lines = metrics(continued)
    assert [line["step"] for line in lines] == list(range(steps))
    expected = [FLAT.over(steps)(t) * 2e-3 for t in range(made, steps)]
    assert [line["lr_transformer"] for line in lines[made:]] == pytest.approx(expected)
    assert read_log(continued)[-1]["epoch"] == (steps - 1) // 4
    folder = Path(shutil.copytree(continued, tmp_path / "run"))
    again = Command(folder, (*timed_options, "--resume", "auto", "--max_hours", other_hours))
    assert "Raise `max_hours` or `max_steps`" in again.run("--max_steps", "0")


@pytest.mark.long
def test_a_killed_run_keeps_its_length_and_ends_as_the_uninterrupted_one(
    timed_run: Path, continued: Path, timed_options: Options, tmp_path: Path, other_hours: str
) -> None:
    folder = Path(shutil.copytree(timed_run, tmp_path / "run"))
    begin = len(metrics(folder))
    command = Command(folder, (*timed_options, "--resume", "auto", "--max_hours", other_hours))
    running = command.start("--max_steps", "0")
    running.wait_until(lambda: state_of(folder / "last.pth")["progress"]["step"] > begin)
    running.kill()
    assert state_of(folder / "last.pth")["progress"]["step"] < begin + 10
    assert "resuming at epoch" in command.run("--max_steps", "0")
    assert length_of(folder) == length_of(continued)
    assert_same_runs(folder, continued)


@pytest.mark.slow
def test_another_weight_decay_of_norms_is_refused_on_resume(
    timed_run: Path, timed_options: Options, tmp_path: Path
) -> None:
    command = Command(tmp_path / "run", (*timed_options, "--resume", timed_run / "last.pth",
                                         "--norm_weight_decay", "none"))  # fmt: skip
    (line,) = errors(command.run(code=2))
    assert "--norm_weight_decay: checkpoint its own, run as weight_decay" in line


@pytest.mark.slow
def test_processes_agree_on_the_length_and_one_continues_what_two_began(
    shapes: Path, tmp_path: Path
) -> None:
    options = ("--coco_path", shapes, "--max_hours", "0.005", "--max_steps", "32",
               "--lr_scheduler", "cosine", "--effective_batch_size", "4", "--batch_size", "2",
               "--eval_every", "1000", "--save_every", "4", "--keep_checkpoints", "1000",
               "--no_tensorboard", "--num_workers", "0", "--device", "cpu",
               "--no_train_backbone_norm")  # fmt: skip
    two = Command(tmp_path / "two", (*options, "--gpus", "2"))
    two.run()
    length = length_of(two.folder)
    assert len(metrics(two.folder)) == min(length["steps"], 32)
    one = tmp_path / "one"
    one.mkdir()
    files = sorted(two.folder.glob("step_*.pth"))
    after = [f for f in files if f.name > f"step_{length['decided_at']:08d}"]
    shutil.copy(after[0], one / "last.pth")
    shutil.copy(two.folder / "metrics.jsonl", one)
    Command(one, options).run("--resume", "auto", "--gpus", "1")
    assert length_of(one) == length
    rates, losses = (
        [[line[key] for line in metrics(folder)] for folder in (one, two.folder)]
        for key in ("lr_transformer", "loss")
    )
    assert rates[0] == rates[1]
    begin = int(after[0].stem.removeprefix("step_"))
    close = slice(begin, begin + 4)  # later, differences of rounding have grown
    assert len(losses[0][close]) == 4
    assert losses[0][close] == pytest.approx(losses[1][close], rel=1e-4)


@pytest.mark.long
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
    assert 0 <= results["stats"]["AP"] <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--checkpoints", "{a}/last.pth", "{b}/last.pth", "--output", "{out}"),
         "of another model than the other checkpoints (`dropout` 0.1, others 0.0"),
        (("--checkpoints", "{a}/last.pth", "{a}/last.pth", "--output", "{out}"), "at least two"),
        (("--output_dir", "{b}", "--last", "9"), "train with --keep_checkpoints 9"),
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


@pytest.mark.slow
def test_the_number_of_detections_kept_is_that_asked_for(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    assert detections_per_image(finished_run / "eval" / "detections.json") == 100  # of 20 x 6
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
