"""Tiles cover an image, and what is found in them is found in the image, once."""

import itertools
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.ops import batched_nms, box_iou

from configs.schema import DataConfig
from configs.tiles import TileOptions
from datasets.build import tiling_of
from datasets.dataset import ImageList
from datasets.tile_batches import TileBatches
from datasets.tiles import Tiling, tiles_of
from datasets.transforms import EvalTransform
from engine.detector import Detector
from engine.evaluation.tiling import merge
from models.deformable_detr import DeformableDETR
from models.queries import DetectorOutput
from tests.unit.models.small import small_model
from util.batch import PaddedBatch
from util.classes import Classes
from util.errors import ConfigError, DataError

SIDES = st.integers(1, 700)


@settings(max_examples=40)
@given(SIDES, SIDES, st.integers(16, 200), st.floats(0, 0.9))
def test_tiles_cover_an_image_and_overlap(
    height: int, width: int, size: int, overlap: float
) -> None:
    tiles = tiles_of(height, width, Tiling(size=size, overlap=overlap))
    assert len({(t.right - t.left, t.bottom - t.top) for t in tiles}) == 1
    for low, high, side in ((0, 2, width), (1, 3, height)):
        spans = sorted({(tile[low], tile[high]) for tile in tiles})
        assert spans[0][0] == 0
        assert spans[-1][1] == side
        assert len(spans) == 1 or all(end - start == size for start, end in spans)
        for (start, end), (following, _) in itertools.pairwise(spans):
            assert start < following
            assert end - following >= min(round(size * overlap - 1e-6), size - 1)
    rows, columns = ({t.top for t in tiles}, {t.left for t in tiles})
    assert len(tiles) == len(rows) * len(columns)


class Blobs(nn.Module):
    """Finds every group of red pixels that touch: a detector whose answers a test knows."""

    def forward(self, batch: PaddedBatch) -> DetectorOutput:
        """Give the boxes of the groups, and queries of no score for the rest."""
        boxes, scores = torch.zeros(len(batch.images), 60, 4), torch.zeros(len(batch.images), 60)
        for n, (image, (height, width)) in enumerate(zip(batch.images, batch.sizes, strict=True)):
            groups, _ = scipy.ndimage.label(image[0].numpy() > 0.5)
            for i, (ys, xs) in enumerate(scipy.ndimage.find_objects(groups)):
                x0, x1, y0, y1 = (
                    xs.start / width,
                    xs.stop / width,
                    ys.start / height,
                    ys.stop / height,
                )
                boxes[n, i] = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
                # parts of objects look as sure as whole ones
                scores[n, i] = 0.9 - 0.01 * i
        return {"pred_logits": scores[..., None].clamp(min=1e-6).logit(), "pred_boxes": boxes}


def finder(model: nn.Module, scale: int) -> Detector:
    return Detector(
        cast(DeformableDETR, model.eval()), Classes((1,), ("red",)),
        data=DataConfig(eval_scale=scale), mean=(0.0,) * 3, std=(1.0,) * 3,
        device=torch.device("cpu"),
    )  # fmt: skip


def scene(seed: int, height: int, width: int, count: int) -> tuple[Image.Image, torch.Tensor]:
    """Return a black image with red rectangles that do not touch, and their boxes."""
    random, pixels = np.random.default_rng(seed), np.zeros((height, width, 3), np.uint8)
    boxes: list[list[int]] = []
    while len(boxes) < count:
        w, h = random.integers(4, 26, 2)
        x, y = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
        if not pixels[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2].any():
            pixels[y : y + h, x : x + w, 0] = 255
            boxes.append([x, y, x + w, y + h])
    return Image.fromarray(pixels), torch.tensor(boxes, dtype=torch.float32)


@pytest.mark.parametrize("measure", ["iou", "ios", "wbf"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_each_object_is_found_once_and_whole(measure: str, batch_size: int) -> None:
    image, truth = scene(batch_size, 410, 530, 90)
    tiling = Tiling(size=128, overlap=0.25, measure=measure)  # type: ignore[arg-type]
    ((_, found),) = finder(Blobs(), 128).detect([image], batch_size=batch_size, tiling=tiling)
    boxes = torch.tensor([box.xyxy for box in found if box.score > 0.1])
    assert len(boxes) == len(truth)
    assert float(box_iou(truth, boxes).max(dim=1).values.min()) > 0.999
    assert [box.score for box in found] == sorted((box.score for box in found), reverse=True)


def test_images_no_larger_than_a_tile_are_seen_as_without_tiles(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, size in (("a", (64, 96, 3)), ("b", (96, 96, 3)), ("c", (97, 60, 3))):
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    (tmp_path / "d.png").write_bytes(b"none")
    paths = sorted(tmp_path.iterdir())
    detector = finder(small_model().float(), 64)
    detector.classes = Classes(tuple(range(20)), ("x",) * 20)
    whole = dict(detector.detect(paths))
    tiled = dict(detector.detect(paths, tiling=Tiling(size=96)))
    assert tiled.keys() == whole.keys() == {0, 1, 2}
    assert tiled[0] == whole[0]
    assert tiled[1] == whole[1]
    assert tiled[2] != whole[2]
    assert tiled[2]


def test_batches_hold_the_tiles_of_one_image_and_are_shared_by_processes(tmp_path: Path) -> None:
    for i, size in enumerate([(300, 200), (100, 100), (250, 120), (40, 40)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    transform = EvalTransform(eval_scale=100, max_size=200, mean=(0.0,) * 3, std=(1.0,) * 3)
    dataset = ImageList(sorted(tmp_path.iterdir()), transform)
    seen = []
    for rank in range(2):
        loader = TileBatches(
            dataset, Tiling(size=100, overlap=0), batch_size=4, rank=rank, world_size=2
        )
        batches = list(loader)
        assert len(loader) == len(batches)
        for batch in batches:
            (image_id,) = {int(target["image_id"]) for target in batch.targets}
            seen += [image_id] * len(batch.targets)
    assert sorted(seen) == [0] * 6 + [1] + [2] * 6 + [3]


def test_an_image_with_an_unreadable_tile_is_left_out_and_the_next_is_whole(
    tmp_path: Path,
) -> None:
    tifffile = pytest.importorskip("tifffile")
    paths = [tmp_path / "damaged.tif", tmp_path / "sound.tif"]
    image, truth = scene(3, 300, 300, 30)
    for path in paths:
        tifffile.imwrite(path, np.asarray(image), compression="deflate", tile=(64, 64))
    with tifffile.TiffFile(paths[0]) as tiff:
        end = tiff.pages[0].dataoffsets[-1]
    content = bytearray(paths[0].read_bytes())
    content[end : end + 40] = b"\xff" * 40
    paths[0].write_bytes(content)
    finder_ = finder(Blobs(), 128)
    found = dict(finder_.detect(paths, tiling=Tiling(size=128, overlap=0.25), batch_size=2))
    assert found.keys() == {1}
    boxes = torch.tensor([box.xyxy for box in found[1] if box.score > 0.1])
    assert len(boxes) == len(truth)
    assert float(box_iou(truth, boxes).max(dim=1).values.min()) > 0.999
    with pytest.raises(DataError, match=r"damaged\.tif: cannot be read"):
        list(finder_.detect(paths, tiling=Tiling(size=128), skip_unreadable=False))


def random_parts(seed: int, each_alone: bool) -> list[dict[str, torch.Tensor]]:
    """Return detections of 4 tiles, or each in a tile of its own."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(120, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(120, 2, generator=generator) * 25], dim=1)
    scores = torch.rand(120, generator=generator)
    labels = torch.randint(0, 3, (120,), generator=generator)
    sizes = [1] * 120 if each_alone else [30] * 4
    parts = zip(*(torch.split(values, sizes) for values in (boxes, scores, labels)), strict=True)
    return [
        {"boxes": b, "scores": s, "labels": c, "tile": torch.full((len(b),), i)}
        for i, (b, s, c) in enumerate(parts)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_different_tiles_are_merged_as_torchvision_suppresses(seed: int) -> None:
    parts = random_parts(seed, each_alone=True)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    kept = batched_nms(whole["boxes"], whole["scores"], whole["labels"], 0.5)
    merged = merge(parts, Tiling(size=9))
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(merged[name], whole[name][kept], rtol=0, atol=0)
    assert len(kept) < 120


@pytest.mark.parametrize("measure", ["iou", "ios"])
def test_boxes_of_one_tile_never_suppress_each_other(measure: str) -> None:
    parts = random_parts(7, each_alone=False)
    rows = sorted(
        ((float(s), int(c), b.tolist(), i) for i, part in enumerate(parts)
         for s, c, b in zip(part["scores"], part["labels"], part["boxes"], strict=True)),
        reverse=True,
    )  # fmt: skip
    kept: list[tuple[float, int, list[float], int]] = []
    for score, label, box, tile in rows:
        for _, other_label, other, other_tile in kept:
            shared = max(0, min(box[2], other[2]) - max(box[0], other[0])) * max(
                0, min(box[3], other[3]) - max(box[1], other[1])
            )
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
            of = min(areas) if measure == "ios" else sum(areas) - shared
            if label == other_label and tile != other_tile and shared / of > 0.6:
                break
        else:
            kept.append((score, label, box, tile))
    merged = merge(parts, Tiling(size=9, measure=measure, threshold=0.6))  # type: ignore[arg-type]
    assert merged["scores"].tolist() == [row[0] for row in kept]
    assert merged["boxes"].tolist() == [row[2] for row in kept]
    assert 10 < len(kept) < 120


def overlap(a: list[float], b: list[float]) -> float:
    """Return the IoU of two boxes."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def test_fused_boxes_are_means_of_those_of_different_tiles() -> None:
    parts = random_parts(7, each_alone=False)
    rows = sorted(
        ((float(s), int(c), b.tolist(), i) for i, part in enumerate(parts)
         for s, c, b in zip(part["scores"], part["labels"], part["boxes"], strict=True)),
        reverse=True,
    )  # fmt: skip
    groups: list[list[tuple[float, int, list[float], int]]] = []

    def mean(group: list[tuple[float, int, list[float], int]]) -> list[float]:
        whole = sum(score for score, *_ in group)
        return [sum(score * box[k] for score, _, box, _ in group) / whole for k in range(4)]

    for row in rows:
        candidates = [
            group for group in groups
            if group[0][1] == row[1] and all(tile != row[3] for *_, tile in group)
            and any(overlap(box, row[2]) > 0.4 for *_, box, _ in group)
            and overlap(mean(group), row[2]) > 0.4
        ]  # fmt: skip
        if candidates:
            max(candidates, key=lambda group: overlap(mean(group), row[2])).append(row)
        else:
            groups.append([row])
    merged = merge(parts, Tiling(size=9, measure="wbf", threshold=0.4))
    assert merged["scores"].tolist() == [group[0][0] for group in groups]
    assert merged["labels"].tolist() == [group[0][1] for group in groups]
    expected = torch.tensor([mean(group) for group in groups])
    torch.testing.assert_close(merged["boxes"], expected, rtol=0, atol=1e-4)
    assert max(map(len, groups)) > 2
    assert 10 < len(groups) < 115


def test_options_of_tiles_need_tiles() -> None:
    assert tiling_of(TileOptions(), 640) is None
    chosen = tiling_of(TileOptions(tile=True, tile_overlap=0.5, tile_merge="ios"), 640)
    assert chosen == Tiling(size=640, overlap=0.5, measure="ios")
    with pytest.raises(ConfigError, match="Add `tile`"):
        TileOptions(tile_size=640)
