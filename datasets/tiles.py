"""Images that are larger than what a model takes, cut into tiles that overlap."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from datasets.collate import Item, collate
from datasets.dataset import CocoDetection, ImageList, make_target
from datasets.sample import Sample
from util.batch import Batch, Target, UnreadableImage


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How images are cut, and how the boxes of tiles are merged.

    Units: `size` is a tile's side in pixels of the original image. Ranges: `overlap` is the minimum
    share of a side that neighbours have in common, in 0..0.9. Of two boxes of a class in different
    tiles, the better one stays where their `measure` exceeds `threshold`: `iou`, or `ios`, the
    intersection over the smaller box.
    """

    size: int
    overlap: float = 0.2
    measure: Literal["iou", "ios"] = "iou"
    threshold: float = 0.5


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


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


class TileBatches:
    """Batches of the tiles of images, image by image; iterable.

    An image of one tile is prepared as without tiles. The targets of all others have, besides
    `orig_size`, the (height, width) of the tile: `tile` [4], its edges in the image; `whole` [2],
    the image's (height, width); `tiles` [], how many the image has. One image is in memory at once.
    """

    def __init__(
        self,
        dataset: CocoDetection | ImageList,
        tiling: Tiling,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Take every image once; the parts of processes do not overlap."""
        self._dataset, self._tiling, self._batch_size = dataset, tiling, batch_size
        sizes = dataset.image_sizes()
        counts = [len(tiles_of(*size, tiling)) for size in sizes]
        # large ones first: what does not fit into memory fails at once
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i][0] * sizes[i][1])
        self._positions = order[rank::world_size]
        self._batches = sum(math.ceil(counts[i] / batch_size) for i in self._positions)

    def __len__(self) -> int:
        """Return the number of batches, where the images are as large as their headers state."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for position in self._positions:
            items: list[Item] = []
            for item in self._items(position):
                items.append(item)
                if len(items) == self._batch_size:
                    yield collate(items)
                    items = []
            if items:
                yield collate(items)

    def _items(self, position: int) -> Iterator[Item]:
        pixels = self._dataset.read_pixels(position)
        if isinstance(pixels, UnreadableImage):
            yield pixels
            return
        height, width = pixels.shape[1:]
        tiles = tiles_of(height, width, self._tiling)
        if len(tiles) == 1:
            yield self._dataset[position]
            return
        image_id = self._dataset.image_id(position)
        for tile in tiles:
            image, target = self._cut(pixels, tile, image_id)
            place = {"tile": tile, "whole": (height, width), "tiles": len(tiles)}
            yield image, target | {name: torch.tensor(value) for name, value in place.items()}

    def _cut(self, pixels: Tensor, tile: Tile, image_id: int) -> tuple[Tensor, Target]:
        part = pixels[:, tile.top : tile.bottom, tile.left : tile.right]
        size = (tile.bottom - tile.top, tile.right - tile.left)
        sample = Sample(part, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), size)
        generator = torch.Generator()  # nothing is drawn in evaluation
        prepared = self._dataset.transform(sample, generator, generator)
        return prepared.image, make_target(prepared, image_id, size)


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
