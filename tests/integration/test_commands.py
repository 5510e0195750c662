"""Train, eval and predict as a user runs them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.conftest import TINY, Cli, read_log


def test_run_folder_holds_what_is_promised(finished_run: Path) -> None:
    log = read_log(finished_run)
    assert [line["epoch"] for line in log] == [0, 1]
    for key in ("train_loss", "train_loss_ce", "train_loss_bbox_unscaled", "train_class_error",
                "train_lr", "test_loss", "n_parameters"):  # fmt: skip
        assert isinstance(log[-1][key], (int, float)), key
    assert len(log[-1]["test_coco_eval_bbox"]) == 12
    steps = [json.loads(x)["step"] for x in (finished_run / "metrics.jsonl").open()]
    assert steps == list(range(8))
    for name in ("config.yaml", "last.pth", "best.pth", "curves.png", "eval/results.json",
                 "eval/detections.json"):  # fmt: skip
        assert (finished_run / name).stat().st_size > 0, name
    assert len(list((finished_run / "pictures").glob("*.png"))) == 2


def test_tensorboard_has_curves_and_pictures(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "grad_norm", "lr_backbone", "lr_transformer", "val/AP"} <= set(tags["scalars"])
    assert len(tags["images"]) == 2
    assert len(events.Scalars("loss")) == 8


def test_checkpoint_loads_with_weights_only(finished_run: Path) -> None:
    content = torch.load(finished_run / "last.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "classes", "config", "progress",
            "best", "versions", "preprocessing"} <= set(content)  # fmt: skip
    assert content["classes"]["ids"] == [3, 7, 11, 18, 24, 52]
    assert content["epoch"] == 1


def test_eval_repeats_the_training_log_to_the_last_digit(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    logged = read_log(finished_run)[-1]["test_coco_eval_bbox"]
    assert list(results["stats"].values()) == logged

    truth = COCO(str(shapes / "annotations" / "instances_val2017.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "eval" / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats.tolist() == logged


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_detections_do_not_depend_on_the_batch_size(
    cli: Cli, finished_run: Path, tmp_path: Path, batch_size: str
) -> None:
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--output_dir", tmp_path,
               "--batch_size", batch_size)  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = json.loads((finished_run / "eval" / "detections.json").read_text())
    actual = json.loads((tmp_path / "eval" / "detections.json").read_text())
    assert len(actual) == len(expected)
    for key in ("score", "bbox"):
        torch.testing.assert_close(
            torch.tensor([d[key] for d in actual]),
            torch.tensor([d[key] for d in expected]),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_predict_draws_every_picture_and_names_the_unreadable(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    source = sorted((shapes / "val2017").iterdir())[0]
    (folder / "one.jpg").write_bytes(source.read_bytes())
    Image.open(source).convert("RGBA").save(folder / "deep" / "two.png")
    (folder / "broken.jpg").write_bytes(source.read_bytes()[:500])
    out = tmp_path / "out"
    done = cli("predict", "--checkpoint", finished_run / "last.pth", "--input", folder,
               "--output_dir", out, "--score_threshold", "0.0", "--batch_size", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "broken.jpg" in done.stdout + done.stderr
    assert Image.open(out / "one.jpg").size == Image.open(source).size
    assert Image.open(out / "deep" / "two.png").size == Image.open(source).size
    predictions = json.loads((out / "predictions.json").read_text())
    assert {p["file_name"] for p in predictions} == {"one.jpg", "deep/two.png"}
    assert {p["category_id"] for p in predictions} <= {3, 7, 11, 18, 24, 52}
    assert set(predictions[0]) >= {"image_id", "category_name", "bbox", "score"}


def test_finetune_carries_rows_over_by_name(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    done = cli("train", "--config", TINY, "--coco_path", shapes, "--output_dir", tmp_path / "run",
               "--finetune", finished_run / "best.pth", "--max_steps", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "7" in done.stdout
    assert (tmp_path / "run" / "last.pth").exists()


def test_doctor_checks_the_op(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stderr
    assert "ms_deform_attn" in done.stdout
    assert "ok" in done.stdout
