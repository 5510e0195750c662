"""What would take very long or very much memory takes neither."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.attacks import USUAL, attack
from tests.integration.conftest import TINY, read_log


def write_crowded(folder: Path, count: int, name: str = "thing") -> tuple[Path, Path]:
    """Write an image with so many boxes, and detections near them; return both JSON files."""
    draw = np.random.default_rng(0)
    box = np.hstack([draw.random((count, 2)) * 960, 5 + 30 * draw.random((count, 2))])
    moved = np.maximum(box + draw.normal(0, 2, box.shape), 1)
    category = draw.integers(1, 4, count).tolist()
    Image.new("RGB", (1000, 1000)).save(folder / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 1000, "height": 1000}],
        "categories": [{"id": i, "name": f"{name} {i}"} for i in (1, 2, 3)],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": c, "bbox": b, "area": b[2] * b[3],
             "iscrowd": 0}
            for i, (b, c) in enumerate(zip(box.tolist(), category, strict=True))
        ],
    }  # fmt: skip
    found = [
        {"image_id": 1, "category_id": c, "bbox": b, "score": s}
        for b, c, s in zip(moved.tolist(), category, draw.random(count).tolist(), strict=True)
    ]
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "found.json").write_text(json.dumps(found))
    return folder / "truth.json", folder / "found.json"


@pytest.mark.parametrize("count", [1000, pytest.param(8000, marks=pytest.mark.slow)])
def test_the_analysis_of_a_crowded_image_ends_within_seconds(tmp_path: Path, count: int) -> None:
    truth, found = write_crowded(tmp_path, count, name="x" * 3000)
    done = attack(tmp_path, "eval", "--detections", found, "--val_annotations", truth,
                  "--val_images", tmp_path, "--output_dir", tmp_path, seconds=10,
                  memory=2**31)  # fmt: skip
    assert done.code == 0, done.output
    analysis = json.loads((tmp_path / "eval" / "analysis.json").read_text())
    assert sum(sum(row) for row in analysis["confusion"]) >= count
    assert (tmp_path / "eval" / "report.html").stat().st_size < 20_000_000


@pytest.mark.parametrize("size", [(65500, 1), (1, 65500), (1, 1)])
def test_the_thinnest_images_are_trained_on_and_evaluated(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        Image.new("RGB", size).save(tmp_path / f"{split}2017" / "a.png")
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
            "categories": [{"id": 1, "name": "line"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, *size],
                             "area": size[0] * size[1], "iscrowd": 0}],
        }  # fmt: skip
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file = tmp_path / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(content))
    done = attack(tmp_path, "train", "--config", TINY, "--coco_path", tmp_path, "--output_dir",
                  tmp_path / "o", "--epochs", "1", "--batch_size", "1", "--no_tensorboard",
                  **USUAL)  # fmt: skip
    assert done.code == 0, done.output
    assert read_log(tmp_path / "o")[-1]["train_unreadable_images"] == 0
