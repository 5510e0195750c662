"""`train --tile`: resumed, split and evaluated like any run, and its checkpoint knows its tiles."""

import json
from pathlib import Path

import pytest

from tests.integration.conftest import TINY, Cli, read_log
from tests.integration.runs import Command, assert_same, errors, metrics, state_of

TILES = ("--tile", "--tile_size", "160", "--tile_empty", "0.5")


def options(shapes: Path, tiles: tuple[str, ...] = TILES) -> tuple[str | Path, ...]:
    return ("--coco_path", shapes, *tiles, "--epochs", "2", "--dropout", "0.1", "--no_tensorboard")


@pytest.fixture(scope="module")
def tiled_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run on the four tiles of each of 16 images."""
    folder = tmp_path_factory.mktemp("runs") / "tiled"
    output = Command(folder, options(shapes)).run()
    boxes = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    assert f"{len(boxes['annotations'])} boxes" in output
    assert "tiles of at most 160x160 pixels" in output
    return folder


@pytest.mark.slow
def test_a_stopped_run_ends_like_the_uninterrupted_one(
    tiled_run: Path, shapes: Path, tmp_path: Path
) -> None:
    steps = read_log(tiled_run)[0]["train_steps"]
    assert steps > 12
    command = Command(tmp_path / "run", (*options(shapes), "--max_steps", str(steps - 3)))
    command.run()
    command.run("--resume", tmp_path / "run" / "last.pth", "--max_steps", "0")
    for key in ("model", "optimizer", "best"):
        found, expected = (state_of(f / "last.pth")[key] for f in (tmp_path / "run", tiled_run))
        assert_same(found, expected, key)


def test_a_checkpoint_is_evaluated_on_tiles_like_those_it_was_trained_on(
    cli: Cli, tiled_run: Path, tmp_path: Path
) -> None:
    stats = {}
    for name, more in (("own", ()), ("given", TILES[:3]), ("whole", ("--no_tile",))):
        done = cli("eval", "--checkpoint", tiled_run / "last.pth", "--no_analysis", "--output_dir",
                   tmp_path / name, *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / name / "eval" / "results.json").read_text())
        stats[name] = [-1 if v is None else v for v in results["stats"].values()]
    logged = read_log(tiled_run)[-1]["test_coco_eval_bbox"]
    assert stats["own"] == stats["given"] == logged
    assert stats["whole"] != logged


def test_predictions_are_those_of_tiles(
    cli: Cli, tiled_run: Path, shapes: Path, tmp_path: Path
) -> None:
    found = []
    for name, more in (("own", ()), ("given", TILES[:3]), ("smaller", ("--tile_size", "96"))):
        done = cli("predict", "--checkpoint", tiled_run / "last.pth", "--no_draw", "--input",
                   shapes / "val2017", "--output_dir", tmp_path / name, *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append((tmp_path / name / "predictions.json").read_bytes())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("more", "words"),
    [((*TILES, "--tile_size", "128"), "--tile_size: checkpoint 160, run 128"),
     (("--no_tile",), "--tile: checkpoint True, run False")],
)  # fmt: skip
def test_a_run_is_not_resumed_on_other_tiles(
    tiled_run: Path, shapes: Path, more: tuple[str, ...], words: str
) -> None:
    command = Command(tiled_run, (*options(shapes, more), "--resume", tiled_run / "last.pth"))
    (line,) = errors(command.run(code=2))
    assert "was saved with different options for the batches, images and frozen parts" in line
    assert words in line


def test_other_commands_see_the_tiles_that_training_sees(
    cli: Cli, shapes: Path, tmp_path: Path
) -> None:
    common = ("--config", TINY, "--coco_path", shapes, *TILES)
    done = cli("preview", *common, "--output_dir", tmp_path, "--count", "5")
    assert done.returncode == 0, done.stderr
    assert "tiles of at most 160x160 pixels" in done.stdout
    assert len(list((tmp_path / "preview").glob("epoch0_*.png"))) == 5
    many = ("--num_queries", "5", "--no_similar")
    counts: list[int] = []
    for more in ((), TILES):
        done = cli("check", "--config", TINY, "--coco_path", shapes, *many, "--output_dir",
                   tmp_path / str(len(counts)), *more)  # fmt: skip
        report = json.loads((tmp_path / str(len(counts)) / "check.json").read_text())
        found = {f["kind"]: f["count"] for f in report["findings"]}
        counts.append(found["too_many_boxes"])
    assert counts[0] > counts[1] > 0


@pytest.mark.slow
def test_two_processes_and_accumulation_train_like_one(shapes: Path, tmp_path: Path) -> None:
    fixed = ("--effective_batch_size", "4", "--epochs", "1", "--dropout", "0", "--lr", "1e-4",
             "--lr_backbone", "1e-4", "--no_train_backbone_norm",
             "--warmup_steps", "0")  # fmt: skip
    ways = {
        "one": ("--batch_size", "4"),
        "parts": ("--batch_size", "1"),
        "two": ("--batch_size", "2", "--gpus", "2", "--device", "cpu"),
    }
    lines = []
    for name, more in ways.items():
        Command(tmp_path / name, (*options(shapes), *fixed, *more)).run()
        lines.append(metrics(tmp_path / name))
    for other in lines[1:]:
        assert [line["step"] for line in other] == [line["step"] for line in lines[0]]
        for found, expected in zip(other, lines[0], strict=True):
            for name in ("loss", "loss_ce", "grad_norm"):
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


@pytest.mark.slow
def test_a_plan_is_made_for_tiles_of_a_given_size(cli: Cli, shapes: Path) -> None:
    common = ("plan", "--coco_path", shapes, "--max_hours", "1", "--device", "cpu", "--tile")
    done = cli(*common)
    assert done.returncode == 2
    assert "--tile_size: is missing" in done.stderr
    done = cli(*common, "--tile_size", "96", "--backbone", "timm/test_resnet")
    assert done.returncode == 0, done.stderr
    assert "plan: 192 images" in done.stdout + done.stderr
