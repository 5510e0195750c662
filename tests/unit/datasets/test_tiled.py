"""Training on tiles: which boxes count where, and that a tile is a part of its image."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.schema import DataConfig
from configs.tiles import TrainTileOptions
from datasets.build import build_dataset, seen_index, split_batch, tiling_of
from datasets.checks.boxes import Limits
from datasets.checks.diagnosis import examine
from datasets.dataset import CocoDetection
from datasets.formats.coco import read_coco_file
from datasets.index import CocoIndex
from datasets.loader import TrainLoader
from datasets.tile_batches import TileBatches
from datasets.tiled import TileDetection, TiledIndex, as_tiles, cut_index
from datasets.tiles import Tiling, boxes_of_tiles, tiles_of
from datasets.transforms import EvalTransform
from util.errors import ConfigError

Content = dict[str, Any]
SIZES = [(150, 210), (64, 64), (97, 40), (130, 70)]  # height, width
COUNTS = [24, 2, 3, 0]  # objects
EXACT = EvalTransform(eval_scale=64, max_size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
TILING = Tiling(size=64, overlap=0.25)


def random_boxes(seed: int, height: int, width: int, count: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    low = random.uniform(0, (width - 2, height - 2), (count, 2))
    high = np.minimum(low + random.uniform(1, 90, (count, 2)), (width, height))
    return np.concatenate([low, high], axis=1).round(1).astype(np.float32)


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    """Four images of noise, the last without objects."""
    images: list[Content] = []
    annotations: list[Content] = []
    for i, (height, width) in enumerate(SIZES):
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
        for x0, y0, x1, y1 in random_boxes(i, height, width, COUNTS[i]).tolist():
            number, side = len(annotations), (x1 - x0, y1 - y0)
            annotations.append({
                "id": number + 1, "image_id": 10 + i, "category_id": 1 + number % 2,
                "bbox": [x0, y0, *side], "area": side[0] * side[1], "iscrowd": 0,
            })  # fmt: skip
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    file, folder = tmp_path / "data.json", tmp_path / "images"
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    folder.mkdir()
    for i, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return CocoIndex.load(file, folder, need_boxes=True)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(30, 300), st.integers(30, 300), st.integers(16, 120),
       st.floats(0, 0.6), st.sampled_from([0.0, 0.3, 0.5, 1.0]))  # fmt: skip
def test_a_box_counts_where_enough_of_it_is_seen_and_somewhere(
    seed: int, height: int, width: int, size: int, overlap: float, min_seen: float
) -> None:
    boxes = random_boxes(seed, height, width, 8)
    tiles = tiles_of(height, width, Tiling(size=size, overlap=overlap))
    found = boxes_of_tiles(boxes, tiles, min_seen)
    counted = [{int(row) for row in rows} for rows in found]
    for row, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        shares = [
            max(0.0, min(x1, t.right) - max(x0, t.left))
            * max(0.0, min(y1, t.bottom) - max(y0, t.top))
            / ((x1 - x0) * (y1 - y0))
            for t in tiles
        ]
        enough = [i for i, share in enumerate(shares) if share > 0 and share >= min_seen]
        expected = enough or [shares.index(max(shares))]
        assert [i for i, rows in enumerate(counted) if row in rows] == expected


def test_a_tile_is_a_part_of_its_image_with_the_boxes_in_it(index: CocoIndex) -> None:
    tiled = cut_index(index, TILING)
    dataset = TileDetection(tiled, EXACT)
    seen: Counter[tuple[int, float, float]] = Counter()
    at = 0
    for i, (height, width) in enumerate(SIZES):
        pixels = np.asarray(Image.open(index.image_dir / f"{i}.png"))
        boxes = index.boxes[index.first[i] : index.first[i + 1]]
        labels = index.labels[index.first[i] : index.first[i + 1]]
        for tile in tiles_of(height, width, TILING):
            image, target = dataset[at]  # type: ignore[misc]
            at += 1
            assert int(target["image_id"]) == 10 + i
            part = pixels[tile.top : tile.bottom, tile.left : tile.right]
            assert target["orig_size"].tolist() == [*part.shape[:2]]
            if part.shape[:2] == (64, 64):
                assert torch.equal((image * 255).round().to(torch.uint8).permute(1, 2, 0),
                                   torch.from_numpy(part.copy()))  # fmt: skip
            h, w = part.shape[:2]
            shown = target["boxes"] * torch.tensor([w, h, w, h])
            corners = [shown[:, :2] - shown[:, 2:] / 2, shown[:, :2] + shown[:, 2:] / 2]
            found = list(zip(torch.cat(corners, 1), target["labels"].tolist(), strict=True))
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
                x0, x1 = (min(max(x, tile.left), tile.right) for x in box[::2])
                y0, y1 = (min(max(y, tile.top), tile.bottom) for y in box[1::2])
                area = (box[2] - box[0]) * (box[3] - box[1])
                if (x1 - x0) * (y1 - y0) / area >= 0.5:
                    expected = [x0 - tile.left, y0 - tile.top, x1 - tile.left, y1 - tile.top]
                    apart = [float((corner - torch.tensor(expected)).abs().max())
                             for corner, its in found if its == label]  # fmt: skip
                    assert min(apart) < 1e-3
                    seen[i, box[0], box[1]] += 1
    assert at == len(dataset) == len(tiled)
    # those of which no tile shows half are learned once
    assert len(tiled.boxes) == sum(seen.values()) + len(index.boxes) - len(seen)


def test_tiles_without_objects_are_left_out_evenly(index: CocoIndex) -> None:
    whole = cut_index(index, TILING)
    without = int((whole.boxes_per_image == 0).sum())
    assert without > 4
    for share in (0.0, 0.5, 1.0):
        part = cut_index(index, TILING, empty=share)
        assert int((part.boxes_per_image == 0).sum()) == round(share * without)
        assert np.array_equal(part.boxes, whole.boxes)
        assert np.array_equal(part.labels, whole.labels)
        assert part.without == without - round(share * without)
        assert len(part.tiles) == len(part) == len(part.images.file_names)
        assert all(tile in whole.tiles.tolist() for tile in part.tiles.tolist())


def test_a_part_is_taken_of_whole_images_alone(index: CocoIndex) -> None:
    with pytest.raises(TypeError, match="whole images"):
        cut_index(index, TILING).part(0.5)


def test_training_images_do_not_depend_on_the_split_of_the_batch(index: CocoIndex) -> None:
    options = TrainTileOptions(tile=True, tile_size=64, tile_min_seen=0.3)
    data = DataConfig(train_scales=(48, 64), eval_scale=64, max_size=80, mosaic=0.5, 
                      crop_scales=(48,), crop_size=(24, 48))  # fmt: skip
    tiled = seen_index(index, options, 64, train=True)
    runs = []
    for cache, max_size, processes in ((0.0, 4, 1), (0.001, 2, 1), (0.0, 1, 2)):
        found = {}
        for rank in range(processes):
            dataset = build_dataset(
                replace(data, cache_images=cache), tiled, train=True, mean=(0.4,) * 3,
                std=(0.2,) * 3, seed=3, epochs=50,
            )  # fmt: skip
            share = split_batch(4, max_size=max_size, rank=rank, world_size=processes)
            loader = TrainLoader(dataset, share, num_workers=0, seed=3)
            loader.set_epoch(2)
            for step, batches in enumerate(loader.effective_batches()):
                for batch in batches:
                    assert batch.images is not None
                    for image, target, (h, w) in zip(
                        batch.images.images, batch.targets, batch.images.sizes, strict=True
                    ):
                        key = (step, int(target["image_id"]), image[:, :h, :w].numpy().tobytes())
                        found[key] = target["boxes"].numpy().tobytes()
        runs.append(found)
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) > 8


def test_tiles_in_evaluation_have_the_boxes_of_those_in_training(index: CocoIndex) -> None:
    whole = CocoDetection(index, EXACT)
    tiles = as_tiles(whole, TILING)
    items = [tiles[i] for i in range(len(tiles))]
    expected = set()
    for image, target in items:  # type: ignore[misc]
        boxes = target["boxes"].numpy().tobytes()
        expected.add((int(target["image_id"]), boxes, image.numpy().tobytes()))
    found = set()
    for batch in TileBatches(whole, TILING, batch_size=3):
        assert batch.images is not None
        for image, target, (h, w) in zip(
            batch.images.images, batch.targets, batch.images.sizes, strict=True
        ):
            pixels = image[:, :h, :w].contiguous().numpy().tobytes()
            found.add((int(target["image_id"]), target["boxes"].numpy().tobytes(), pixels))
    assert found == expected


def test_the_report_counts_the_boxes_of_tiles_as_check_does(index: CocoIndex) -> None:
    tiled = cut_index(index, TILING)
    assert isinstance(tiled, TiledIndex)
    most = int(tiled.boxes_per_image.max())
    assert 3 < most < 24
    source = read_coco_file(index.place, index.image_dir)
    for queries in (most, most - 1):
        notices = [line for line in tiled.report(queries).splitlines() if "queries" in line]
        limits = Limits(queries, 64, 64, TILING)
        found = examine({"train": source}, limits, processes=0, similar=False).findings
        assert bool(notices) == ("too_many_boxes" in found) == (queries < most)
    without_tiles = examine(
        {"train": source}, Limits(most, 64, 64), processes=0, similar=False
    ).findings
    assert "too_many_boxes" in without_tiles
    cut = 0
    for i, (height, width) in enumerate(SIZES):
        for x0, y0, x1, y1 in index.boxes[index.first[i] : index.first[i + 1]].tolist():
            cut += not any(
                t.left <= x0 and t.top <= y0 and x1 <= t.right and y1 <= t.bottom
                for t in tiles_of(height, width, TILING)
            )
    assert f"  notice: {cut} of {len(index.boxes)} objects are cut in every tile" in tiled.report(
        20
    )


def test_check_measures_boxes_as_large_as_they_are_in_tiles(index: CocoIndex) -> None:
    source = read_coco_file(index.place, index.image_dir)
    whole, tiles = (
        examine({"train": source}, Limits(50, 32, 32, tiling), processes=0, similar=False).findings
        for tiling in (None, TILING)
    )
    assert len(whole["small_bbox"]) > len(tiles["small_bbox"]) > 0


def test_an_image_smaller_than_stated_has_unreadable_tiles(index: CocoIndex) -> None:
    tiled = cut_index(index, TILING)
    Image.new("RGB", (100, 64)).save(index.image_dir / "0.png")
    items = [TileDetection(tiled, EXACT)[i] for i in range(len(tiles_of(150, 210, TILING)))]
    reasons = [item.reason for item in items if not isinstance(item, tuple)]
    assert 0 < len(reasons) < len(items)
    assert "is only 100x64 pixels" in reasons[0]


def test_options_of_tiles() -> None:
    tiling = tiling_of(TrainTileOptions(tile=True, tile_min_seen=0.2), 640)
    assert tiling == Tiling(size=640, min_seen=0.2)
    assert tiling_of(TrainTileOptions(), 640) is None
    with pytest.raises(ConfigError, match="tile_empty: .* Add `tile`"):
        TrainTileOptions(tile_empty=0.5)
