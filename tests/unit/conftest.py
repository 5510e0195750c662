"""Small COCO-format sets, written for each test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Content = dict[str, Any]
Written = tuple[Path, Path]


@pytest.fixture
def content() -> Content:
    """Return three images of 40x30 with a box each, under categories 7 and 3."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (5, 9, 2)
        ],
        "annotations": [
            {**box, "iscrowd": 0}
            for box in (
                {"id": 0, "image_id": 5, "category_id": 7, "bbox": [4, 6, 10, 12], "area": 120.0},
                {"id": 1, "image_id": 9, "category_id": 3, "bbox": [0, 0, 40, 30], "area": 600.0},
                {"id": 2, "image_id": 2, "category_id": 7, "bbox": [1.5, 2.5, 3, 4], "area": 12.0},
            )
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Content], Written]:
    """Return a function that writes a set and its images: (JSON file, image folder)."""

    def write_set(content: Content) -> Written:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for entry in content["images"]:
            pixels = rng.integers(0, 256, size=(30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / entry["file_name"])
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path, folder

    return write_set
