"""The generated set: exact boxes, reproducible images, and care with existing folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from datasets.index import CocoIndex
from datasets.shapes import CATEGORY_IDS, USUAL, _background, draw_image, generate_shapes
from util.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "set"
    generate_shapes(path, num_train=40, num_val=5, seed=0)
    return path


def load(folder: Path, split: str) -> CocoIndex:
    annotation_file = folder / "annotations" / f"instances_{split}2017.json"
    return CocoIndex.load(annotation_file, folder / f"{split}2017", need_boxes=True)


@pytest.mark.long
def test_set_reads_without_notices_and_covers_all_classes_and_sizes(folder: Path) -> None:
    train, val = load(folder, "train"), load(folder, "val")
    assert (len(train), len(val)) == (40, 5)
    assert train.notices == val.notices == []
    assert dict(zip(train.classes.names, train.classes.ids, strict=True)) == CATEGORY_IDS
    assert set(train.labels) == set(range(len(CATEGORY_IDS)))
    area = train.annotations.area
    assert (area < 32**2).any()
    assert (area > 96**2).any()
    assert ((area >= 32**2) & (area <= 96**2)).any()
    assert set(train.images.ids).isdisjoint(val.images.ids)
    assert 1 <= np.diff(train.first).min() <= np.diff(train.first).max() <= USUAL.most_objects


def test_images_depend_on_seed_and_position_alone(folder: Path, tmp_path: Path) -> None:
    generate_shapes(tmp_path / "fewer", num_train=3, num_val=1, seed=0)
    generate_shapes(tmp_path / "other", num_train=3, num_val=1, seed=1)
    first, same, other = (
        load(path, "train") for path in (folder, tmp_path / "fewer", tmp_path / "other")
    )
    count = same.first[-1]
    np.testing.assert_array_equal(first.boxes[:count], same.boxes)
    assert first.boxes[:4].tolist() != other.boxes[:4].tolist()
    name = same.images.file_names[2]
    assert (first.image_dir / name).read_bytes() == (same.image_dir / name).read_bytes()


@pytest.mark.long
def test_boxes_bound_exactly_what_is_painted() -> None:
    """A lone object is where the image differs from its background by more than the grain."""
    errors = []
    for seed in range(120):
        image, objects = draw_image(np.random.default_rng(seed))
        if len(objects) != 1:
            continue
        rng = np.random.default_rng(seed)
        background = _background(rng, USUAL.size).clip(0, 255)
        painted = np.abs(np.asarray(image) - background).sum(-1) > 3 * 13
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        measured = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        x, y, w, h = objects[0].box_xywh
        outer = [np.floor(x), np.floor(y), np.ceil(x + w), np.ceil(y + h)]
        np.testing.assert_array_equal(measured[:2], np.maximum(measured[:2], outer[:2]))
        np.testing.assert_array_equal(measured[2:], np.minimum(measured[2:], outer[2:]))
        errors.append(np.abs(measured - [x, y, x + w, y + h]).max())
    assert len(errors) > 5
    assert max(errors) < 1


def test_crowded_scenes_hold_many_small_objects(tmp_path: Path) -> None:
    generate_shapes(tmp_path / "set", num_train=6, num_val=1, seed=0, scene="crowded")
    train = load(tmp_path / "set", "train")
    assert {tuple(size) for size in train.images.sizes.tolist()} == {(480, 640)}
    counts = np.diff(train.first)
    assert 15 <= counts.min() <= counts.max() <= 60
    sides = (train.boxes[:, 2:] - train.boxes[:, :2]).max(axis=1)
    assert sides.max() <= 1.1 * 64
    assert np.median(sides) < 48
    with pytest.raises(DataError, match="images of crowded scenes, seed 0 .* not 6 of usual"):
        generate_shapes(tmp_path / "set", num_train=6, num_val=1, seed=0)


def test_in_small_scenes_all_objects_are_small_ones_of_coco(tmp_path: Path) -> None:
    generate_shapes(tmp_path / "set", num_train=8, num_val=1, seed=0, scene="small")
    train = load(tmp_path / "set", "train")
    assert {tuple(size) for size in train.images.sizes.tolist()} == {(216, 288)}
    counts = np.diff(train.first)
    assert 4 <= counts.min() < counts.max() <= 24
    width, height = (train.boxes[:, 2:] - train.boxes[:, :2]).T
    assert (width * height).max() < 32**2


def test_existing_set_is_kept_and_anything_else_refused(folder: Path, tmp_path: Path) -> None:
    marker = folder / "annotations" / "instances_train2017.json"
    before = marker.stat().st_mtime_ns
    generate_shapes(folder, num_train=40, num_val=5, seed=0)
    assert marker.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="it holds 40 train images of usual scenes, seed 0"):
        generate_shapes(folder, num_train=40, num_val=5, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="Choose a new or empty one"):
        generate_shapes(tmp_path, num_train=1, num_val=1, seed=0)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps({"info": "x"}))
    with pytest.raises(DataError, match="Choose a new or empty one"):
        generate_shapes(tmp_path, num_train=1, num_val=1, seed=0)
    assert (tmp_path / "notes.txt").read_text() == "mine"
