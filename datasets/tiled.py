"""Training on tiles of large images: an index that has a tile where another has an image."""

from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datasets.arrays import Images, Names
from datasets.dataset import CocoDetection
from datasets.index import CocoIndex
from datasets.sample import Size
from datasets.tiles import Tile, Tiling, boxes_of_tiles, tiles_of
from datasets.windows import Stored, Windows, open_windows

_WHOLE = Tile(0, 0, 0, 0)  # of an image whose size is not known


@dataclass(frozen=True, eq=False)
class TiledIndex(CocoIndex):
    """The tiles of the images of `whole`, as if each were an image, with the id of its image.

    Tile t is `tiles[t]` ([T,4], edges in pixels) of image `image[t]` ([T], its position in
    `whole`). Its boxes are those that count in it, clipped to it. `annotations` stay those of
    whole images. `without` is how many tiles without boxes were left out.
    """

    whole: CocoIndex
    tiling: Tiling
    tiles: NDArray[np.int64]
    image: NDArray[np.int64]
    without: int

    def part(self, share: float) -> NoReturn:
        """Raise TypeError: a share of tiles is not one of images, and images give the AP."""
        raise TypeError(f"take a part ({share}) of the whole images, and cut that into tiles")

    def report(self, num_queries: int) -> str:
        """Return the report of the whole images, with the boxes of tiles compared to queries."""
        lines = [self.whole.summary(), *(f"  notice: {notice}" for notice in self.notices)]
        counts = self.boxes_per_image
        side, empty = self.tiling.size, int((counts == 0).sum())
        left_out = f" ({self.without} more left out)" if self.without else ""
        lines.append(
            f"  {len(self)} tiles of at most {side}x{side} pixels, {len(self.boxes)} boxes in "
            f"them, {empty} tiles without boxes{left_out}"
        )
        if cut := self.never_whole():
            lines.append(
                f"  notice: {cut} of {len(self.whole.boxes)} objects are cut in every tile that "
                "shows them, as they are larger than what tiles have in common. Raise "
                "`tile_overlap` or `tile_size` if these matter."
            )
        if crowded := int((counts > num_queries).sum()):
            lines.append(
                f"  notice: {crowded} tiles have more boxes (up to {int(counts.max())}) than the "
                f"model has queries ({num_queries}): the rest can never be found. Raise "
                "`num_queries`, or lower `tile_size`."
            )
        return "\n".join(lines)

    def data_report(self) -> dict[str, Any]:
        """Return what was fixed or left out in the whole images."""
        return self.whole.data_report()

    def never_whole(self) -> int:
        """Return how many objects no tile shows whole."""
        cut = 0
        for i in range(len(self.whole)):
            boxes = self.whole.boxes[self.whole.first[i] : self.whole.first[i + 1]]
            height, width = self.whole.images.sizes[i].tolist()
            if len(boxes) and height and width:
                tiles = tiles_of(height, width, self.tiling)
                inside = np.zeros(len(boxes), dtype=bool)
                for tile in tiles:
                    inside |= (boxes[:, :2] >= tile[:2]).all(1) & (boxes[:, 2:] <= tile[2:]).all(1)
                cut += int((~inside).sum())
        return cut


def cut_index(index: CocoIndex, tiling: Tiling, *, empty: float = 1.0) -> TiledIndex:
    """Return the tiles of an index.

    Ranges: `empty` is the share of the tiles without boxes that stay, in 0..1, evenly spaced over
    the data.
    """
    tiles: list[Tile] = []
    images: list[int] = []
    rows: list[NDArray[np.int64]] = []
    boxes: list[NDArray[np.float32]] = []
    for i, (height, width) in enumerate(index.images.sizes.tolist()):
        own = np.arange(index.first[i], index.first[i + 1])
        if height and width:
            some = tiles_of(height, width, tiling)
            counted = boxes_of_tiles(index.boxes[own], some, tiling.min_seen)
        else:
            some, counted = [_WHOLE], [np.arange(len(own))]
        for tile, chosen in zip(some, counted, strict=True):
            tiles.append(tile)
            images.append(i)
            rows.append(own[chosen])
            low, high = tile[:2], tile[2:] if tile != _WHOLE else (np.inf, np.inf)
            inside = index.boxes[own[chosen]].reshape(-1, 2, 2).clip(low, high) - np.asarray(low)
            boxes.append(inside.reshape(-1, 4).astype(np.float32))
    counts = np.array([len(chosen) for chosen in rows], dtype=np.int64)
    nothing = np.flatnonzero(counts == 0)
    stay = np.linspace(0, len(nothing) - 1, round(empty * len(nothing))).round().astype(np.int64)
    kept = np.sort(np.concatenate([np.flatnonzero(counts), nothing[stay]]))
    edges, image = np.array(tiles, dtype=np.int64)[kept], np.array(images, dtype=np.int64)[kept]
    chosen = np.concatenate([rows[t] for t in kept.tolist()])
    names = [index.images.file_names[i] for i in range(len(index))]
    return TiledIndex(
        **{f.name: getattr(index, f.name) for f in fields(CocoIndex)}
        | {
            "images": Images(
                index.images.ids[image],
                Names.of(names[i] for i in image.tolist()),
                np.stack([edges[:, 3] - edges[:, 1], edges[:, 2] - edges[:, 0]], axis=1),
                index.images.texts,
            ),
            "boxes": np.concatenate([boxes[t] for t in kept.tolist()]),
            "labels": index.labels[chosen],
            "first": np.concatenate([[0], np.cumsum(counts[kept])]),
        },
        whole=index,
        tiling=tiling,
        tiles=edges,
        image=image,
        without=len(nothing) - len(stay),
    )


class TileDetection(CocoDetection):
    """The tiles of a `TiledIndex`, prepared like images.

    A cache holds whole images, of those whose files cannot be read in parts.
    """

    index: TiledIndex

    def _decode(self, position: int) -> tuple[Tensor, Size]:
        """Return the pixels of a tile, from the cache if its image is there."""
        image, tile = int(self.index.image[position]), Tile(*self.index.tiles[position].tolist())
        cached = None if self._cache is None else self._cache.get(image)
        if cached is not None:
            return _read(Stored(cached[0]), tile)
        height, width = self.index.whole.images.sizes[image].tolist()
        with open_windows(self.path(position), (height, width)) as windows:
            if self._cache is None or not windows.whole:
                return _read(windows, tile)
            pixels = windows.read(Tile(0, 0, windows.size[1], windows.size[0]))
            self._cache.put(image, pixels, windows.size)
            return _read(Stored(pixels), tile)


def _read(windows: Windows, tile: Tile) -> tuple[Tensor, Size]:
    """Return a tile's pixels and (height, width), cut to the image, which may be smaller than said.

    Raises:
        READ_ERRORS: the file is damaged, or has nothing where the tile is.
    """
    height, width = windows.size
    edges = (*tile[:2], min(tile.right, width), min(tile.bottom, height))
    inside = Tile(0, 0, width, height) if tile == _WHOLE else Tile(*edges)
    size = (inside.bottom - inside.top, inside.right - inside.left)
    if min(size) < 1:
        raise OSError(f"is only {width}x{height} pixels, less than its annotations say")
    return windows.read(inside), size


def as_tiles(dataset: CocoDetection, tiling: Tiling) -> TileDetection:
    """Return the tiles of a data set's images, prepared and labelled as these."""
    index = cut_index(dataset.index, tiling)
    return TileDetection(index, dataset.transform, classes=dataset.classes)
