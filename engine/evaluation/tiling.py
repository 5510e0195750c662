"""The detections of tiles become those of their images."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from datasets.tiles import Tiling, seen_whole_elsewhere
from util.batch import Batch, Target

Found = dict[str, Tensor]


def by_image(
    results: Iterable[tuple[Batch, list[Found]]], tiling: Tiling | None
) -> Iterator[tuple[Target, Found]]:
    """Yield the target of each image with its detections, best first, in pixels of the image.

    With `tiling`, `results` are those of `TileBatches`, in its order. What was found in an image of
    one tile stays as it is. One of which a tile cannot be read has no detections.
    """
    parts: list[Found] = []
    image_id = -1
    for batch, detections in results:
        for target, found in zip(batch.targets, detections, strict=True):
            if tiling is None or "tile" not in target:
                yield target, found
                continue
            if int(target["image_id"]) != image_id:
                parts, image_id = [], int(target["image_id"])
            tile = target["tile"]
            boxes = found["boxes"] + tile[[0, 1, 0, 1]].to(found["boxes"])
            number = torch.full((len(boxes),), len(parts))
            placed = {**found, "boxes": boxes, "tile": number}
            twice = seen_whole_elsewhere(boxes, tile.tolist(), tiling, target["whole"])
            parts.append({name: values[~twice] for name, values in placed.items()})
            if len(parts) == int(target["tiles"]):
                yield target, merge(parts, tiling)
                parts = []


def merge(parts: list[Found], tiling: Tiling) -> Found:
    """Return the detections of several tiles, less those that another tile has better.

    Non-maximum suppression within classes, and only between tiles: a tile keeps all that it has.

    Shape: of each part scores, labels and tile [K], boxes [K,4] xyxy.
    """
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = found["scores"].argsort(descending=True, stable=True)
    found = {name: values[order] for name, values in found.items()}
    tile = found.pop("tile")
    kept = torch.zeros(len(tile), dtype=torch.bool)
    for label in sorted(set(found["labels"].tolist())):
        rows = (found["labels"] == label).nonzero().flatten()
        kept[rows] = _best(found["boxes"][rows].double(), tile[rows], tiling)
    return {name: values[kept] for name, values in found.items()}


def _best(boxes: Tensor, tile: Tensor, tiling: Tiling) -> Tensor:
    """Return which boxes of a class stay; they come best first. Shape: [K,4], [K] -> [K] bool."""
    kept = torch.ones(len(boxes), dtype=torch.bool)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    for i in range(len(boxes) - 1):
        if not kept[i]:
            continue
        after = boxes[i + 1 :]
        low = torch.maximum(after[:, :2], boxes[i, :2])
        high = torch.minimum(after[:, 2:], boxes[i, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        if tiling.measure == "iou":
            of = area[i + 1 :] + area[i] - shared
        else:
            of = torch.minimum(area[i + 1 :], area[i])
        kept[i + 1 :] &= ~((shared > tiling.threshold * of) & (tile[i + 1 :] != tile[i]))
    return kept
