"""Decode image files of any mode into RGB, and read their sizes without decoding."""

import contextlib
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from util.files import HEAD, no_text, open_regular

LARGEST_IMAGE = 2**31  # bytes
# What reading raises of files that are missing, damaged, truncated, huge or no images.
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Not pixels without another program (the first runs Ghostscript), or no images.
_NOT_READ = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC")
_SCAN = b"\xff\xda"  # begins one; in its data a 0 follows each 255
_PART = 1 << 20  # bytes that are looked through at once; one that lies across is not missed much
_USUAL_SCANS = 20
_MOST_SCANNED = 10**9  # pixels of all scans together: about ten seconds
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
# What brings the stored pixels upright. Pillow's own function rewrites all of the EXIF data, and
# fails where any of it is invalid.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# What some of Pillow's readers raise of damage, as if it were a mistake in the program.
_OTHER_ERRORS = (
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)


@contextlib.contextmanager
def as_read_error() -> Iterator[None]:
    """Make one of READ_ERRORS of whatever Pillow raises; nothing else may run within."""
    try:
        yield
    except _OTHER_ERRORS as error:
        raise OSError(f"damaged image: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def open_image(file: Path | IO[bytes] | Image.Image) -> Iterator[Image.Image]:
    """Open an image to read its header; one that is open already stays as it is.

    Raises:
        READ_ERRORS: there is none, or more pixels than Pillow's limit.
    """
    if isinstance(file, Image.Image):
        yield file
        return
    limit = Image.MAX_IMAGE_PIXELS  # beyond it Pillow only warns: a small file can claim any
    hint = f"the {limit} of `max_pixels`; raise it if the file is sound"
    with contextlib.ExitStack() as stack:
        if isinstance(file, Path):
            file = stack.enter_context(open_regular(file, LARGEST_IMAGE))
        try:
            with as_read_error():
                image = stack.enter_context(Image.open(file))
        except UnidentifiedImageError as error:  # which would describe the open file
            name = getattr(file, "name", "")
            file.seek(0)
            what = no_text(file.read(HEAD))
            text = f"{name!r} {what}" if what else f"cannot identify image file {name!r}"
            raise UnidentifiedImageError(text) from error
        except Image.DecompressionBombError as error:  # of twice the limit
            size = str(error).split(" exceeds")[0]
            raise Image.DecompressionBombError(f"{size}: over {hint}") from None
        if image.format in _NOT_READ:  # whatever the file is called
            raise UnidentifiedImageError(f"a file of the format {image.format} is not read")
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError(
                f"{image.width}x{image.height} pixels are more than {hint}"
            )
        yield image


def limit_pixels(max_pixels: int | None) -> None:
    """Set how many pixels the largest image may have; None leaves Pillow's limit as it is."""
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels


def decode(image: Image.Image) -> None:
    """Decode the pixels of an open image.

    Raises:
        READ_ERRORS: the file cannot be decoded to its end.
    """
    with as_read_error():
        _refuse_endless_scans(image)
        image.load()


def _refuse_endless_scans(image: Image.Image) -> None:
    """Raise OSError for a JPEG that would take minutes.

    A progressive one comes in about ten scans. Each is decoded over all pixels, and may be of a few
    bytes.
    """
    file = getattr(image, "fp", None)
    if not isinstance(image, JpegImageFile) or not image.info.get("progressive") or file is None:
        return
    place = file.tell()
    file.seek(0)
    scans = sum(part.count(_SCAN) for part in iter(lambda: file.read(_PART), b""))
    file.seek(place)
    if scans > _USUAL_SCANS and scans * image.width * image.height > _MOST_SCANNED:
        raise OSError(f"damaged image: {scans} scans of {image.width}x{image.height} pixels")


def read_header(file: Path | Image.Image) -> tuple[tuple[int, int], int] | None:
    """Return the stored (height, width) in pixels and the EXIF orientation, None without header."""
    try:
        with open_image(file) as image:
            return (image.height, image.width), orientation_of(image)
    except READ_ERRORS:
        return None


def upright_point(x: float, y: float, orientation: int) -> tuple[float, float]:
    """Return where a point of the stored pixels is upright; both as fractions of the sides."""
    return {
        1: (x, y),
        2: (1 - x, y),
        3: (1 - x, 1 - y),
        4: (x, 1 - y),
        5: (y, x),
        6: (1 - y, x),
        7: (1 - y, 1 - x),
        8: (y, 1 - x),
    }[orientation]


def stored_point(x: float, y: float, orientation: int) -> tuple[float, float]:
    """Undo `upright_point`: a quarter turn is undone by the other one, the rest by itself."""
    return upright_point(x, y, {6: 8, 8: 6}.get(orientation, orientation))


def read_rgb(file: Path | Image.Image, stated_size: tuple[int, int] | None) -> Image.Image:
    """Decode an image to 8-bit RGB; see `read_reduced`, of which this is the whole image."""
    return read_reduced(file, stated_size, lambda height, width: (height, width))[0]


def read_reduced(
    file: Path | Image.Image,
    stated_size: tuple[int, int] | None,
    decoded_size: Callable[[int, int], tuple[int, int]],
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image to 8-bit RGB, and return with it the (height, width) of the whole.

    Annotations are drawn on the stored pixels or on the upright image; `stated_size`, their
    (height, width), decides. Without it the EXIF orientation is applied. A JPEG is decoded at a
    half, a quarter or an eighth if that is at least what `decoded_size` asks for of a (height,
    width): the other frequencies are never computed.

    Raises:
        READ_ERRORS: the file cannot be decoded to its end.
    """
    with open_image(file) as image:
        if not isinstance(image, JpegImageFile):
            decode(image)  # the orientation may stand behind the pixels
        stored_size, orientation = (image.height, image.width), orientation_of(image)
        if stated_size is None:
            upright = orientation != 1
        else:
            upright = orientation in TURNED and stated_size == stored_size[::-1] != stored_size
        size = stored_size[::-1] if upright and orientation in TURNED else stored_size
        factor = _reduction(size, decoded_size(*size))
        if factor > 1:
            with as_read_error():
                image.draft(None, (image.width // factor, image.height // factor))
        decode(image)
        rgb = _to_rgb(image)
        return rgb.transpose(_UPRIGHT[orientation]) if upright else rgb, size


def _reduction(size: tuple[int, int], min_size: tuple[int, int]) -> int:
    """Return the largest divisor of `size` that leaves at least `min_size`.

    A side is rounded up by a quarter of a pixel at most: boxes stay on what they enclose.
    """
    sides = list(zip(size, min_size, strict=True))
    fitting = (
        factor
        for factor in (8, 4, 2)
        if all(side // factor >= low and -side % factor <= factor // 4 for side, low in sides)
    )
    return next(fitting, 1)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (as stored) where the tag is missing or makes no sense."""
    try:
        found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*READ_ERRORS, *_OTHER_ERRORS):
        return 1
    return found if found in _UPRIGHT else 1


SMALL_SIDE = 32  # pixels


def small_grey(image: Image.Image, orientation: int) -> bytes:
    """Return a decoded image as a square of `SMALL_SIDE` grey pixels, upright, row by row."""
    small = _to_rgb(image).resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BOX)
    grey = small.convert("L")
    return (grey.transpose(_UPRIGHT[orientation]) if orientation != 1 else grey).tobytes()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys, which `convert` would cut at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # the usual ones
# Images that Pillow does not read, but people's folders hold: of phones, cameras and scanners.
_UNREAD = (
    *(".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"),
    *(".rw2", ".exr", ".dcm", ".avif"),  # the last by Pillow 11.3 and later
)


def is_image(path: Path) -> bool:
    """Return whether there is a file with the name of an image, of any format that is read."""
    return is_image_name(path.name) and os.path.isfile(path)


def is_image_name(name: str) -> bool:
    """Return whether a name, with folders or without, is one of an image that can be read."""
    place, suffix = os.path.splitext(name)
    known = suffix.lower() in SUFFIXES or suffix.lower() in _all_suffixes()
    return known and not os.path.basename(place).startswith("._")  # a Mac's


def is_unread(name: str) -> bool:
    """Return whether a name without folders is one of an image of a kind that is not read."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in _UNREAD and suffix not in _all_suffixes() and not name.startswith("._")


def unread_kinds(paths: Iterable[Path]) -> str:
    """Return how many files are images of kinds that are not read, such as "3 .heic"; or ""."""
    suffixes = Counter(path.suffix.lower() for path in paths if is_unread(path.name))
    return ", ".join(f"{suffixes[kind]} {kind}" for kind in _UNREAD if suffixes[kind])


@lru_cache
def _all_suffixes() -> frozenset[str]:
    formats = Image.registered_extensions()  # imports all of Pillow's readers
    readable = Image.OPEN.keys() - set(_NOT_READ)
    return frozenset(suffix for suffix, name in formats.items() if name in readable)
