"""What is read off a data set, against the file it was generated with."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import DataConfig
from datasets.build import load_index
from datasets.shapes import generate_shapes
from engine.auto.facts import facts_of


def test_facts_are_those_of_the_file(tmp_path: Path) -> None:
    generate_shapes(tmp_path / "set", num_train=6, num_val=3, seed=1, scene="crowded")
    file = tmp_path / "set" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    doubled = dict(content["annotations"][0])
    x, y, width, height = doubled["bbox"]
    doubled |= {"id": 10**6, "bbox": [x, y + 0.1 * height, width, height]}  # IoU 0.82
    content["annotations"].append(doubled)
    file.write_text(json.dumps(content))
    data = DataConfig(coco_path=str(tmp_path / "set"))
    facts = facts_of(load_index(data, "train"), load_index(data, "val"))
    boxes = [entry["bbox"] for entry in content["annotations"]]
    per_image = [
        sum(entry["image_id"] == image["id"] for entry in content["annotations"])
        for image in content["images"]
    ]
    sides = [(w * h) ** 0.5 / 480 for _, _, w, h in boxes]
    assert (facts.images, facts.val_images, facts.boxes) == (6, 3, len(boxes))
    assert facts.most_boxes == max(per_image)
    assert facts.short_side == 480
    assert facts.aspect == pytest.approx(640 / 480)
    assert facts.area == pytest.approx(640 / 480)
    assert facts.small == pytest.approx(np.quantile(sides, 0.1), rel=1e-4)
    assert facts.large == pytest.approx(np.quantile(sides, 0.9), rel=1e-4)
    assert facts.overlapping * len(boxes) == pytest.approx(2)


def test_a_long_image_is_measured_as_its_long_side_lets_it_be_resized(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = [(300, 100)] * 2  # width, height: thrice as long as high, twice is allowed for
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{i}.png")
    (tmp_path / "a.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h}
                   for i, (w, h) in enumerate(sizes)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 5],
                         "area": 100, "iscrowd": 0} for i in range(2)],
        "categories": [{"id": 1, "name": "thing"}],
    }))  # fmt: skip
    data = DataConfig(train_images=str(folder), train_annotations=str(tmp_path / "a.json"))
    index = load_index(data, "train")
    facts = facts_of(index, index)
    assert facts.aspect == 2  # at a short side of 1 the image would be 2 x 2/3
    assert facts.small == pytest.approx(10 * 2 / 300)
    assert facts.area == pytest.approx(2 * 2 / 3)
    assert facts.overlapping == 0
