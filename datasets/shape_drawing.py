"""Draw one image of the generated `shapes` set, with the exact extent of every object."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SUBPIXELS = 4  # masks are drawn this much finer than the image, in each direction
MIN_VISIBLE = 0.75  # an object may lose at most a quarter of itself to the ones drawn over it
SIZE = (288, 216)  # of an image: one for all, so that no batch is padded
SMALLEST, LARGEST = 20, 150  # size of an object, pixels
MAX_OBJECTS = 12
_ATTEMPTS = 8

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Points = NDArray[np.float64]


def _polar(radii: list[float]) -> Points:
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii))
    x, y = np.cos(angles) * radii, np.sin(angles) * radii
    return np.stack([x, y], axis=1)


def _rectangle(half_width: float, half_height: float) -> Points:
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    return np.array(corners, dtype=np.float64) * (half_width, half_height)


def _cross(arm: float) -> Points:
    quarter = [(1.0, -arm), (1.0, arm), (arm, arm)]
    turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
    return np.array([(a * x + b * y, c * x + d * y) for a, b, c, d in turns for x, y in quarter])


# Outlines in units of half the object's size; a second outline is a hole. Ids have gaps and are
# not in order of name, as in real data.
OUTLINES: dict[str, tuple[Points, ...]] = {
    "circle": (_polar([1.0] * 64),),
    "square": (_rectangle(0.85, 0.85),),
    "triangle": (_polar([1.1] * 3),),
    "star": (_polar([1.1, 0.45] * 5),),
    "cross": (_cross(0.3),),
    "ring": (_polar([1.0] * 64), _polar([0.55] * 64)),
}
CATEGORY_IDS = {
    "square": 3,
    "star": 7,
    "circle": 11,
    "ring": 18,
    "triangle": 24,
    "cross": 52,
}


@dataclass(frozen=True)
class DrawnObject:
    """What is visible of one object: `box_xywh` in pixels, `area` in square pixels."""

    category_id: int
    box_xywh: tuple[float, float, float, float]
    area: float


@dataclass
class _Placed:
    """An object's window (whole pixels) and its mask in subpixels, shrinking as others cover it."""

    category_id: int
    left: int
    top: int
    mask: BoolArray
    full_area: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        height, width = (side // SUBPIXELS for side in self.mask.shape)
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def overlap(self, other: "_Placed") -> tuple[BoolArray, BoolArray] | None:
        """Return the views of both masks where the windows meet, None where they do not."""
        low = np.maximum((self.top, self.left), (other.top, other.left))
        ends = [np.add((p.top, p.left), np.array(p.mask.shape) // SUBPIXELS) for p in (self, other)]
        high = np.minimum(*ends)
        if (high <= low).any():
            return None
        views = []
        for placed in (self, other):
            (y0, x0), (y1, x1) = (
                (corner - (placed.top, placed.left)) * SUBPIXELS for corner in (low, high)
            )
            views.append(placed.mask[y0:y1, x0:x1])
        return views[0], views[1]

    def extent(self) -> DrawnObject:
        """Measure what is left of the mask."""
        columns, rows = np.flatnonzero(self.mask.any(0)), np.flatnonzero(self.mask.any(1))
        x0, y0 = columns[0] / SUBPIXELS, rows[0] / SUBPIXELS
        x1, y1 = (columns[-1] + 1) / SUBPIXELS, (rows[-1] + 1) / SUBPIXELS
        box = (float(self.left + x0), float(self.top + y0), float(x1 - x0), float(y1 - y0))
        return DrawnObject(self.category_id, box, float(self.mask.sum() / SUBPIXELS**2))


def draw_image(rng: np.random.Generator) -> tuple[Image.Image, list[DrawnObject]]:
    """Draw an image with 1 to 12 objects, later ones on top."""
    width, height = SIZE
    canvas = _background(rng, width, height)
    placed: list[_Placed] = []
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        new = _place(rng, placed, width, height)
        if new is not None:
            _paint(rng, canvas, new)
            placed.append(new)
    grain = int(rng.integers(0, 13))
    canvas += rng.integers(-grain, grain + 1, size=canvas.shape, dtype=np.int8)
    pixels = canvas.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels), [one.extent() for one in placed]


def _background(rng: np.random.Generator, width: int, height: int) -> FloatArray:
    """Return a colour gradient [H,W,3] in 0..255, plain, striped or blotched."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
    start, end = rng.uniform(20, 235, size=(2, 3)).astype(np.float32)
    canvas = np.asarray(start + (end - start) * (along[..., None] + 0.5), dtype=np.float32)
    texture, strength = int(rng.integers(3)), rng.uniform(10, 35)
    if texture == 1:
        direction, period = rng.uniform(0, np.pi), rng.uniform(8, 40)
        phase = (np.cos(direction) * x + np.sin(direction) * y) * (2 * np.pi / period)
        canvas += np.float32(strength) * np.sin(phase, dtype=np.float32)[..., None]
    elif texture == 2:
        coarse = rng.integers(0, 256, size=(8, 10, 3), dtype=np.uint8)
        blotches = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        canvas += (np.asarray(blotches, dtype=np.float32) - 128) * np.float32(strength / 90)
    return canvas


def _place(
    rng: np.random.Generator, placed: list[_Placed], width: int, height: int
) -> _Placed | None:
    """Find room for a new object and cover what lies below; None where it would hide too much."""
    for _ in range(_ATTEMPTS):
        new = _random_object(rng, width, height)
        met = [(old, views) for old in placed if (views := old.overlap(new)) is not None]
        if all(
            old.mask.sum() - (below & above).sum() >= MIN_VISIBLE * old.full_area
            for old, (below, above) in met
        ):
            for _, (below, above) in met:
                below &= ~above
            return new
    return None


def _random_object(rng: np.random.Generator, width: int, height: int) -> _Placed:
    name = list(OUTLINES)[int(rng.integers(len(OUTLINES)))]
    largest = min(LARGEST, 0.7 * min(width, height))
    size = float(rng.uniform(np.sqrt(SMALLEST), np.sqrt(largest)) ** 2)  # small ones more often
    margin = 0.3 * size  # the image's border may cut an object, but not its middle
    centre = rng.uniform((margin, margin), (width - margin, height - margin))
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * (size / 2)
    outlines = [outline @ turn + centre for outline in OUTLINES[name]]
    left, top = np.maximum(np.floor(outlines[0].min(0)) - 1, 0).astype(int)
    right, bottom = np.minimum(np.ceil(outlines[0].max(0)) + 1, (width, height)).astype(int)
    fine = Image.new("L", ((right - left) * SUBPIXELS, (bottom - top) * SUBPIXELS))
    pen = ImageDraw.Draw(fine)
    for fill, outline in zip((255, 0), outlines, strict=False):
        # ImageDraw puts the centre of a subpixel at whole coordinates.
        points = (outline - (left, top)) * SUBPIXELS - 0.5
        pen.polygon([(float(px), float(py)) for px, py in points], fill=fill)
    mask = np.asarray(fine) > 0
    return _Placed(CATEGORY_IDS[name], int(left), int(top), mask, int(mask.sum()))


def _paint(rng: np.random.Generator, canvas: FloatArray, new: _Placed) -> None:
    """Blend the object into the image by its coverage of each pixel."""
    fine = Image.fromarray(np.where(new.mask, 255, 0).astype(np.uint8))
    coverage = np.asarray(fine.reduce(SUBPIXELS), dtype=np.float32)[..., None] / 255
    width = coverage.shape[1]
    behind = canvas[new.window]
    mean = np.average(behind, axis=(0, 1), weights=np.broadcast_to(coverage, behind.shape))
    colour = _contrasting(lambda: rng.uniform(0, 255, size=3), mean)
    shade = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * rng.uniform(-20, 20)
    canvas[new.window] = behind + coverage * (colour + shade - behind).astype(np.float32)


def _contrasting(draw: Callable[[], Points], mean: FloatArray) -> Points:
    """Draw colours until one stands out from what is behind."""
    colour = draw()
    while np.abs(colour - mean).sum() < 170:
        colour = draw()
    return colour
