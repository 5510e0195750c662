"""Rectangles of an image, without the rest of it where its file can be read in parts.

Of TIFF files, `tifffile` reads the strips or tiles that a rectangle touches. Formats that are one
stream from the first pixel to the last, such as JPEG and PNG, are decoded whole, once.
"""

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datasets.images import (
    LARGEST_IMAGE,
    READ_ERRORS,
    TURNED,
    as_read_error,
    open_image,
    orientation_of,
    read_rgb,
)
from datasets.sample import CHANNELS, Size, to_pixels
from datasets.tiles import Tile
from util.files import open_regular

_MODES = {"L": 1, "I;16": 1, "I;16B": 1, "RGB": 3, "RGBA": 4}  # samples of a pixel by Pillow's mode
_MINISBLACK, _RGB, _YCBCR = 1, 2, 6  # photometric interpretations
_PLAIN, _JPEG = 1, 7
# LZW, deflate (twice), PackBits, Zstandard: decoders that write no more than they are asked for
_COMPRESSIONS = (_PLAIN, _JPEG, 5, 8, 32946, 32773, 50000)
_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of a JPEG's size: baseline, extended, progressive
# quantisation, Huffman and arithmetic tables, restarts, applications' data, comments
_TABLES = (0xDB, 0xC4, 0xCC, 0xDD, *range(0xE0, 0xF0), 0xFE)
_SLACK = 2**22  # bytes of a compressed part beyond twice its pixels, such as a colour profile
_STRAIGHT_ALPHA = (2,)  # the extra sample of an image whose colours are not multiplied by it
_LARGEST_PART = 2**24  # pixels of a strip or tile; larger ones gain little over the whole image
_KEPT = 2**26  # bytes of decoded parts: a row of tiles across a wide image
_BROKEN = "damaged image: a part of it has another size than the file states"


class Windows(Protocol):
    """An open image. `size` is its (height, width), `whole` whether all of it is decoded."""

    size: Size
    whole: bool

    def read(self, tile: Tile) -> Tensor:
        """Return a rectangle that lies in the image, as uint8 [3,h,w] RGB.

        Raises:
            READ_ERRORS: the file is damaged there.
        """
        ...


@contextlib.contextmanager
def open_windows(
    source: Path | Image.Image | Tensor, stated_size: Size | None
) -> Iterator[Windows]:
    """Open an image to read rectangles of it; pixels are those of `read_rgb`.

    `stated_size` decides whether the image is turned upright, see `read_reduced`.

    Raises:
        READ_ERRORS: the file cannot be read.
    """
    if isinstance(source, Tensor):
        yield Stored(source)
        return
    with ExitStack() as stack:
        parts = _open_tiff(source, stated_size, stack) if isinstance(source, Path) else None
        yield Decoded(read_rgb(source, stated_size)) if parts is None else parts


class Stored:
    """Windows of pixels [3,H,W] in memory."""

    whole = True

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels
        self.size: Size = (pixels.shape[1], pixels.shape[2])

    def read(self, tile: Tile) -> Tensor:
        """Return a view."""
        return self._pixels[:, tile.top : tile.bottom, tile.left : tile.right]


class Decoded:
    """Windows of a decoded image, which takes four bytes a pixel; no second copy is made."""

    whole = True

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self.size: Size = (image.height, image.width)

    def read(self, tile: Tile) -> Tensor:
        """Copy a rectangle."""
        return to_pixels(self._image.crop(tile))


class TiffParts:
    """Windows of a TIFF file, of which only the strips or tiles that they touch are decoded.

    Some decoded parts are kept, as neighbouring windows share them.
    """

    whole = False

    def __init__(self, page: Any, file: Any) -> None:
        self._page, self._file = page, file
        self._end = os.fstat(file.fileno()).st_size
        self.size: Size = (page.imagelength, page.imagewidth)
        self._samples = int(page.samplesperpixel)
        # strips are tiles as wide as the image
        sides = (page.tilelength, page.tilewidth)
        if not page.is_tiled:
            sides = (min(page.rowsperstrip, self.size[0]), self.size[1])
        self._height, self._width = map(int, sides)
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._bytes = 0

    @property
    def part_pixels(self) -> int:
        """Return the pixels of a strip or tile."""
        return self._height * self._width

    def read(self, tile: Tile) -> Tensor:
        """Put a rectangle together."""
        with as_read_error():
            shape = (tile.bottom - tile.top, tile.right - tile.left, self._samples)
            window = np.zeros(shape, self._page.dtype)
            across = -(-self.size[1] // self._width)
            for row in range(tile.top // self._height, -(-tile.bottom // self._height)):
                for column in range(tile.left // self._width, -(-tile.right // self._width)):
                    part = self._part(row * across + column)
                    _paste(
                        window,
                        part,
                        row * self._height - tile.top,
                        column * self._width - tile.left,
                    )
        return _to_rgb(window)

    def _part(self, number: int) -> NDArray[Any]:
        """Return a decoded strip or tile [h,w,samples], cut to the image."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        page = self._page
        data = self._stored(number)
        decoded, _, shape = page.decode(
            data or None, number, jpegtables=page.jpegtables, jpegheader=page.jpegheader
        )
        _, height, width, samples = shape
        if decoded is None:  # a part that was left out of the file is black
            decoded = np.zeros((1, height, width, samples), page.dtype)
        if decoded.dtype.newbyteorder("=") != page.dtype or decoded.shape[3] != self._samples:
            raise OSError(_BROKEN)
        part: NDArray[Any] = decoded[0, :height, :width]
        self._kept[number] = part
        self._bytes += _held(part)
        while self._bytes > _KEPT and len(self._kept) > 1:
            self._bytes -= _held(self._kept.popitem(last=False)[1])
        return part

    def _stored(self, number: int) -> bytes:
        """Return a part as it is in the file, of which no number is believed."""
        page = self._page
        if number >= min(len(page.dataoffsets), len(page.databytecounts)):
            raise OSError(_BROKEN)
        start, count = page.dataoffsets[number], page.databytecounts[number]
        decoded = self.part_pixels * self._samples * page.dtype.itemsize
        if page.compression == _PLAIN:
            count = min(count, decoded)
        if min(start, count) < 0 or count > 2 * decoded + _SLACK:
            raise OSError(_BROKEN)
        if start + count > self._end:
            raise OSError("damaged image: the file ends before its pixels")
        self._file.seek(start)
        data: bytes = self._file.read(count)
        if data and page.compression == _JPEG:
            height, width = _jpeg_size(data)
            if height > self._height or width > self._width:
                raise OSError(_BROKEN)
        return data


def _held(part: NDArray[Any]) -> int:
    """Return the bytes that an array keeps in memory, be it a view."""
    return part.nbytes if part.base is None else part.base.nbytes


def _jpeg_size(data: bytes) -> Size:
    """Return the (height, width) that a JPEG's first frame header states.

    Raises:
        OSError: another kind of segment, or none, comes before it.
    """
    at = 2
    while len(data) >= at + 9 and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            return height, width
        if marker == 0xFF:  # filling
            at += 1
        elif marker in _TABLES:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        else:
            break
    raise OSError(_BROKEN)


def _paste(window: NDArray[Any], part: NDArray[Any], top: int, left: int) -> None:
    """Put what a window shows of a part into it; `top` and `left` may be outside."""
    (height, width, _), (h, w, _) = window.shape, part.shape
    y0, y1 = max(top, 0), min(top + h, height)
    x0, x1 = max(left, 0), min(left + w, width)
    window[y0:y1, x0:x1] = part[y0 - top : y1 - top, x0 - left : x1 - left]


def _to_rgb(window: NDArray[Any]) -> Tensor:
    """Return samples [h,w,1|3|4] as Pillow's images become RGB."""
    if window.dtype == np.uint16:
        window = (window // 257).astype(np.uint8)
    if window.shape[2] == 1:
        window = np.repeat(window, CHANNELS, axis=2)
    return torch.from_numpy(np.ascontiguousarray(window[..., :CHANNELS])).permute(2, 0, 1)


def _open_tiff(path: Path, stated_size: Size | None, stack: ExitStack) -> TiffParts | None:
    """Return a TIFF file whose parts can be read as Pillow reads the whole, else None.

    Raises:
        READ_ERRORS: it cannot be opened, or has more pixels than the limit.
    """
    try:
        import imagecodecs  # noqa: F401 - without it, tifffile fails where a part is decoded
        import tifffile
    except ImportError:
        return None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs is raised, too
    with open_image(path) as image:
        orientation, size = orientation_of(image), (image.height, image.width)
        if image.format != "TIFF" or image.mode not in _MODES:
            return None
        if orientation != 1 and (stated_size is None or orientation in TURNED):
            return None
        mode = image.mode
    file = stack.enter_context(open_regular(path, LARGEST_IMAGE))
    try:
        with as_read_error():
            tiff = stack.enter_context(tifffile.TiffFile(file))
            page: Any = tiff.pages[0]
            if (page.imagelength, page.imagewidth) != size or not _is_plain(page, mode):
                return None
            parts = TiffParts(page, file)
    except READ_ERRORS:  # Pillow may read what tifffile does not
        return None
    return parts if parts.part_pixels <= _LARGEST_PART else None


def _is_plain(page: Any, mode: str) -> bool:
    """Return whether a page has the samples that Pillow's mode has, in the same meaning."""
    samples = _MODES[mode]
    # a JPEG decoder turns other colours into RGB
    colours = {_RGB, _YCBCR} if page.compression == _JPEG else {_RGB}
    photometric = {_MINISBLACK} if samples == 1 else colours
    bits = 16 if mode.startswith("I") else 8
    return bool(
        page.compression in _COMPRESSIONS
        and page.jpegheader is None
        and page.bitspersample == bits
        and page.dtype == np.dtype(f"uint{bits}")
        and page.samplesperpixel == samples
        and page.photometric in photometric
        and (samples < 4 or tuple(page.extrasamples) == _STRAIGHT_ALPHA)
        and (samples == 1 or page.planarconfig == 1)
        and page.imagedepth == 1
    )
