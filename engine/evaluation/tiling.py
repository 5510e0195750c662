"""The detections of tiles become those of their images."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from datasets.tiles import Tiling, seen_whole_elsewhere
from util.batch import Batch, Target

Found = dict[str, Tensor]
_AT_ONCE = 64  # boxes that are compared with those near them


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
    kept = [True] * len(boxes)
    for better, worse in _same_objects(boxes, tile, tiling):
        if kept[better]:
            kept[worse] = False
    return torch.tensor(kept, dtype=torch.bool)


def _same_objects(boxes: Tensor, tile: Tensor, tiling: Tiling) -> list[list[int]]:
    """Return the pairs of boxes of different tiles of which only the first can stay, in order.

    Boxes are compared from left to right, each with those that begin before it ends: a large image
    has hundreds of thousands, and few of them are near each other.
    """
    order = boxes[:, 0].argsort()
    boxes, tile = boxes[order], tile[order]
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    lefts = boxes[:, 0].contiguous()
    pairs = [torch.zeros(0, 2, dtype=torch.int64)]
    for start in range(0, len(boxes), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        near = slice(start, int(torch.searchsorted(lefts, boxes[some, 2].max(), right=True)))
        low = torch.maximum(boxes[some, None, :2], boxes[None, near, :2])
        high = torch.minimum(boxes[some, None, 2:], boxes[None, near, 2:])
        shared = (high - low).clamp(min=0).prod(dim=2)
        if tiling.measure == "iou":
            of = area[some, None] + area[None, near] - shared
        else:
            of = torch.minimum(area[some, None], area[None, near])
        same = (shared > tiling.threshold * of) & (tile[some, None] != tile[None, near])
        pairs.append(order[same.triu(diagonal=1).nonzero() + start])
    found = torch.cat(pairs).sort(dim=1).values
    ordered: list[list[int]] = found[found[:, 0].argsort(stable=True)].tolist()
    return ordered
