"""Decode picture files of any mode into RGB, and read their sizes without decoding."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises for files that are missing, damaged, truncated, huge or no pictures at all.
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def read_size(path: Path, *, upright: bool) -> tuple[int, int] | None:
    """Return (height, width) in pixels from a file's header, None if it has none.

    `upright` gives the size after the EXIF orientation is applied.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = upright and _orientation(image) in _TURNED
    except READ_ERRORS:
        return None
    return (width, height) if turned else (height, width)


def read_rgb(path: Path, stated_size: tuple[int, int] | None) -> Image.Image:
    """Decode a picture to 8-bit RGB.

    Annotations are drawn on the stored pixels or on the upright picture; `stated_size`, their
    (height, width), tells which. Without it the EXIF orientation is applied.

    Raises:
        READ_ERRORS: the file cannot be decoded to its end.
    """
    with Image.open(path) as image:
        image.load()
        if stated_size is None:
            upright = _orientation(image) != 1
        else:
            stored_size = (image.height, image.width)
            upright = stated_size == stored_size[::-1] != stored_size
            upright = upright and _orientation(image) in _TURNED
        return _to_rgb(ImageOps.exif_transpose(image) if upright else image)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (as stored) where the tag is missing or damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (*READ_ERRORS, TypeError):
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys, which `convert` would cut at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
