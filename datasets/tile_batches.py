"""The tiles of large images in batches, for evaluation and prediction."""

import math
from collections.abc import Iterator, Sequence

import torch

from datasets.collate import Item, collate
from datasets.dataset import CocoDetection, ImageList, make_target, unreadable
from datasets.images import READ_ERRORS
from datasets.sample import Sample, clip_boxes
from datasets.tiles import Tile, Tiling, boxes_of_tiles, tiles_of
from datasets.windows import Windows
from util.batch import Batch


class TileBatches:
    """Batches of the tiles of images, image by image; iterable.

    An image of one tile is prepared as without tiles. The targets of all others have, besides
    `orig_size`, the (height, width) of the tile: `tile` [4], its edges in the image; `whole` [2],
    the image's (height, width); `tiles` [], how many the image has. One image is open at once.
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
        dataset, image_id = self._dataset, self._dataset.image_id(position)
        try:
            with dataset.windows(position) as windows:
                tiles = tiles_of(*windows.size, self._tiling)
                if len(tiles) > 1:
                    yield from self._tiles(windows, tiles, position)
        except READ_ERRORS as error:
            yield unreadable(image_id, dataset.path(position), error)
            return
        if len(tiles) == 1:
            yield dataset[position]

    def _tiles(self, windows: Windows, tiles: Sequence[Tile], position: int) -> Iterator[Item]:
        boxes, labels = self._dataset.objects(position)
        counted = boxes_of_tiles(boxes.numpy(), tiles, self._tiling.min_seen)
        generator = torch.Generator()  # nothing is drawn in evaluation
        for tile, rows in zip(tiles, counted, strict=True):
            size = (tile.bottom - tile.top, tile.right - tile.left)
            inside = boxes[rows] - torch.tensor(tile[:2] * 2)
            sample = clip_boxes(Sample(windows.read(tile), inside, labels[rows], size))
            prepared = self._dataset.transform(sample, generator, generator)
            target = make_target(prepared, self._dataset.image_id(position), size)
            place = {"tile": tile, "whole": windows.size, "tiles": len(tiles)}
            yield prepared.image, target | {k: torch.tensor(v) for k, v in place.items()}
