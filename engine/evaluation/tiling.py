"""The detections of tiles become those of their images."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torchvision.ops import box_iou

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
    """Return the detections of several tiles, each object's once.

    Non-maximum suppression or fusion within classes, and only between tiles: a tile keeps all that
    it has.

    Shape: of each part scores, labels and tile [K], boxes [K,4] xyxy.
    """
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = found["scores"].argsort(descending=True, stable=True)
    found = {name: values[order] for name, values in found.items()}
    tile = found.pop("tile")
    kept = torch.zeros(len(tile), dtype=torch.bool)
    for label in sorted(set(found["labels"].tolist())):
        rows = (found["labels"] == label).nonzero().flatten()
        boxes = found["boxes"][rows].double()
        if tiling.measure == "wbf":
            kept[rows], boxes = _fused(boxes, found["scores"][rows].double(), tile[rows], tiling)
            found["boxes"][rows] = boxes.to(found["boxes"])
        else:
            kept[rows] = _best(boxes, tile[rows], tiling)
    return {name: values[kept] for name, values in found.items()}


def _best(boxes: Tensor, tile: Tensor, tiling: Tiling) -> Tensor:
    """Return which boxes of a class stay; they come best first. Shape: [K,4], [K] -> [K] bool."""
    kept = [True] * len(boxes)
    for better, worse in _same_objects(boxes, tile, tiling):
        if kept[better]:
            kept[worse] = False
    return torch.tensor(kept, dtype=torch.bool)


def _fused(boxes: Tensor, scores: Tensor, tile: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Return which boxes of a class stay, and all boxes, of which those that stay are fused.

    Weighted boxes fusion (arXiv 1910.13302, Sec. 3), with tiles in the place of models. Boxes come
    best first. Each joins, of the groups of boxes that it overlaps, the one whose mean, weighted by
    scores, it overlaps most, unless its tile has a box in it; else it begins a group. A group keeps
    the score of its best box: how many tiles show an object says nothing about it.

    Shape: boxes [K,4], scores and tile [K] -> [K] bool, [K,4].
    """
    near: list[list[int]] = [[] for _ in range(len(boxes))]
    for better, worse in _same_objects(boxes, tile, tiling):
        near[worse].append(better)
    fused, tiles = boxes.clone(), tile.tolist()
    groups: dict[int, list[int]] = {}  # by their best box
    group_of: list[int] = []
    for row, better_ones in enumerate(near):
        joined, most = row, tiling.threshold
        for best in dict.fromkeys(group_of[other] for other in better_ones):
            overlap = float(box_iou(fused[[best]], boxes[[row]]))
            if overlap > most and all(tiles[other] != tiles[row] for other in groups[best]):
                joined, most = best, overlap
        group_of.append(joined)
        groups.setdefault(joined, []).append(row)
        if joined != row:
            members = groups[joined]
            weight = scores[members].clamp(min=1e-9)[:, None]
            fused[joined] = (weight * boxes[members]).sum(0) / weight.sum()
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    kept[list(groups)] = True
    return kept, fused


def _same_objects(boxes: Tensor, tile: Tensor, tiling: Tiling) -> list[list[int]]:
    """Return the pairs of boxes of different tiles that may be one object, in order of the first.

    The first of a pair is the better one.

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
        if tiling.measure == "ios":
            of = torch.minimum(area[some, None], area[None, near])
        else:
            of = area[some, None] + area[None, near] - shared
        same = (shared > tiling.threshold * of) & (tile[some, None] != tile[None, near])
        pairs.append(order[same.triu(diagonal=1).nonzero() + start])
    found = torch.cat(pairs).sort(dim=1).values
    ordered: list[list[int]] = found[found[:, 0].argsort(stable=True)].tolist()
    return ordered
