"""Real photographs through the real command line; skipped where the data is absent."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.conftest import Cli, read_log

Shared = Callable[[str], Path]


@pytest.mark.slow
def test_coco_trains_and_evaluates_with_the_published_preset(
    cli: Cli, shared: Shared, tmp_path: Path
) -> None:
    data = shared("datasets/coco_by")
    out = tmp_path / "run"
    done = cli("train", "--config", "configs/deformable_detr_r50.yaml", "--coco_path", data,
               "--output_dir", out, "--backbone_weights", "none", "--max_steps", "2",
               "--batch_size", "1", "--effective_batch_size", "1", "--train_scales", "256",
               "--eval_scale", "160",
               "--max_size", "320", "--num_workers", "1", "--num_images", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "54 images" in done.stdout
    assert "80 classes" in done.stdout
    log = read_log(out)
    assert log[-1]["train_steps"] == 2
    assert len(log[-1]["test_coco_eval_bbox"]) == 12


@pytest.mark.slow
def test_eight_photographs_are_overfitted(cli: Cli, shared: Shared, tmp_path: Path) -> None:
    data = shared("datasets/coco_by")
    weights = shared("weights/tf_efficientnet_lite0.safetensors")
    content = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    objects = [a for a in content["annotations"] if not a["iscrowd"]]
    counts = {i["id"]: sum(a["image_id"] == i["id"] for a in objects) for i in content["images"]}
    chosen = [i for i, count in counts.items() if 2 <= count <= 5][:8]
    content["images"] = [i for i in content["images"] if i["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    annotations = tmp_path / "eight.json"
    annotations.write_text(json.dumps(content))
    out = tmp_path / "run"
    done = cli("train", "--config", "configs/finetune_small.yaml", "--output_dir", out,
               "--train_images", data / "train2017", "--train_annotations", annotations,
               "--val_images", data / "train2017", "--val_annotations", annotations,
               "--backbone_weights", weights, "--num_workers", "0", "--hflip", "0",
               "--train_scales", "192", "--eval_scale", "192", "--max_size", "320",
               "--epochs", "200", "--eval_every", "200", "--num_images", "8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    average_precision_50 = read_log(out)[-1]["test_coco_eval_bbox"][1]
    assert average_precision_50 > 0.9


def test_a_photograph_is_explained_and_measured(
    cli: Cli, shared: Shared, finished_run: Path, tmp_path: Path
) -> None:
    photo = sorted((shared("datasets/coco_by") / "val2017").glob("*.jpg"))[0]
    common = ("--checkpoint", finished_run / "last.pth", "--input", photo, "--device", "cpu")
    done = cli("explain", *common, "--output_dir", tmp_path, "--threshold", "0", "--count", "1",
               "--token", "50,60,0", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "explanation.json").read_text())
    with Image.open(photo) as image:
        assert content["size"] == list(image.size)
    for explained in (content["queries"][0], content["token"]):
        weights = np.array(explained["sampling"]["weights"])  # layers, heads, levels, points
        np.testing.assert_allclose(weights.sum((2, 3)), 1, atol=1e-5)
    assert (tmp_path / "explain.html").stat().st_size > 20_000  # the photograph is in it
    report = tmp_path / "report.json"
    done = cli("benchmark", *common, "--runs", "2", "--warm_up", "0", "--output", report)
    assert done.returncode == 0, done.stderr
    measured = json.loads(report.read_text())
    assert measured["images"] == 1
    assert max(measured["size"]) <= 96
    assert measured["stages"]["decode"]["median_ms"] > 0.5
