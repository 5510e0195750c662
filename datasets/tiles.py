"""How images that are larger than what a model takes are cut into tiles that overlap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How images are cut, and how the boxes of tiles are merged.

    Units: `size` is a tile's side in pixels of the original image. Ranges: `overlap` is the minimum
    share of a side that neighbours have in common, in 0..0.9; `min_seen` is the share of an object
    from which on it counts in a tile, see `boxes_of_tiles`. Of two boxes of a class in different
    tiles, the better one stays where their `measure` exceeds `threshold`: `iou`, or `ios`, the
    intersection over the smaller box. With `wbf`, boxes become one where their IoU exceeds it.
    """

    size: int
    overlap: float = 0.2
    min_seen: float = 0.5
    measure: Literal["iou", "ios", "wbf"] = "iou"
    threshold: float = 0.5


def tiles_of(height: int, width: int, tiling: Tiling) -> list[Tile]:
    """Return the tiles of an image by rows, all of one size; one tile if none of its sides is more.

    They are spread evenly, so neighbours overlap by `tiling.overlap` or more.
    """
    rows, columns = (_starts(side, tiling) for side in (height, width))
    return [
        Tile(left, top, min(left + tiling.size, width), min(top + tiling.size, height))
        for top in rows
        for left in columns
    ]


def _starts(side: int, tiling: Tiling) -> list[int]:
    beyond = side - tiling.size
    if beyond <= 0:
        return [0]
    # a step of 1 at least: an overlap may round up to the whole of a small tile
    step = max(1, math.floor(tiling.size * (1 - tiling.overlap)))
    count = 1 + math.ceil(beyond / step)
    return [i * beyond // (count - 1) for i in range(count)]


def boxes_of_tiles(
    boxes: NDArray[np.float32], tiles: Sequence[Tile], min_seen: float
) -> list[NDArray[np.int64]]:
    """Return for each tile the rows of the boxes that count in it.

    Those are the boxes of which it shows `min_seen` (0..1) of the area or more. A box of which no
    tile shows so much counts in the one that shows most of it, so that no object is lost.

    Shape: boxes [B,4] xyxy in pixels of the image, with an area.
    """
    exact = boxes.astype(np.float64)
    area = (exact[:, 2:] - exact[:, :2]).prod(axis=1)

    def seen(tile: Tile) -> NDArray[np.float64]:
        low, high = np.maximum(exact[:, :2], tile[:2]), np.minimum(exact[:, 2:], tile[2:])
        return np.asarray((high - low).clip(0).prod(axis=1) / area)

    most, best = np.full(len(boxes), -1.0), np.zeros(len(boxes), dtype=np.int64)
    for number, tile in enumerate(tiles):
        share = seen(tile)
        best[share > most] = number
        most = np.maximum(most, share)
    lacking = most < min_seen
    rows = []
    for number, tile in enumerate(tiles):
        share = seen(tile)
        rows.append(
            np.flatnonzero((share > 0) & ((share >= min_seen) | (lacking & (best == number))))
        )
    return rows


def seen_whole_elsewhere(
    boxes: Tensor, tile: Sequence[int], tiling: Tiling, whole: Tensor
) -> Tensor:
    """Return which boxes of a tile end at its border, though a neighbour shows all of the object.

    That is so for a box at an inner border that begins within what is shared with the tile beyond
    it. A border is reached from a hundredth of a tile on, as no model is exact.

    Shape: boxes [K,4] xyxy in pixels of the image, whole [2] as (height, width) -> [K] bool.
    """
    height, width = whole.tolist()
    near = tiling.size / 100
    elsewhere = torch.zeros(len(boxes), dtype=torch.bool)
    for axis, side in ((0, width), (1, height)):
        starts = _starts(side, tiling)
        number = starts.index(int(tile[axis]))
        low, high = boxes[:, axis], boxes[:, axis + 2]
        if number > 0:
            start, end = starts[number], starts[number - 1] + tiling.size
            elsewhere |= (low < start + near) & (high < end - near)
        if number + 1 < len(starts):
            start, end = starts[number + 1], starts[number] + tiling.size
            elsewhere |= (high > end - near) & (low > start + near)
    return elsewhere
