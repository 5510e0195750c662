"""Images with boxes, class names and scores."""

import bisect
import colorsys
import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

_DARK, _LIGHT = (0, 0, 0), (255, 255, 255)
_GOLDEN_RATIO = 0.618034
_MOST_TAGS = 1000  # of an image: beyond, they would hide it and take their time
_LONGEST_NAME = 2000  # characters


def label_colour(label: int) -> Colour:
    """Return the colour of a class: always the same, neighbours far apart in hue."""
    hue = (0.02 + label * _GOLDEN_RATIO) % 1.0
    saturation = (0.85, 0.65, 0.95)[label % 3]
    value = (1.0, 0.85)[label // 3 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(background: Colour) -> Colour:
    """Return black or white, whichever has the greater contrast ratio (WCAG 2): at least 4.5."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3294.6 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _LIGHT if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else _DARK


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships this font on every platform; it knows Latin, Greek and Cyrillic.
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )


def draw_boxes(
    image: Image.Image,
    boxes_xyxy: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """Return a copy of `image` with boxes and a tag on each.

    Unlike torchvision's, tags stay whole and inside the image and avoid each other; where they
    compete for a place, those of higher score choose first. Where there are very many, only the
    first of them get one.

    Shape: boxes_xyxy [K,4] in pixels; `labels` (which choose the colours), `names` and `scores`
    have K entries. Boxes are clipped to the image; those outside it are skipped.
    """
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(image)
    right, bottom = image.width - 1.0, image.height - 1.0
    size = max(9, round(min(image.size) * 0.026))
    boxes = {
        i: (min(max(x0, 0.0), right), min(max(y0, 0.0), bottom), min(x1, right), min(y1, bottom))
        for i, (x0, y0, x1, y1) in enumerate(boxes_xyxy.reshape(-1, 4).tolist())
        if x0 < image.width and y0 < image.height and x1 > 0 and y1 > 0 and x0 <= x1 and y0 <= y1
    }
    order = list(boxes) if scores is None else sorted(boxes, key=lambda i: -scores[i])
    colours = {i: label_colour(int(labels[i])) for i in order}
    tags: dict[int, tuple[Rectangle, str, ImageFont.FreeTypeFont]] = {}
    taken = np.zeros((len(order[:_MOST_TAGS]), 4))
    for i in order[:_MOST_TAGS]:
        text = names[i] if scores is None else f"{names[i]} {scores[i]:.2f}".lstrip()
        if text:
            # small objects stand close together: smaller tags leave more of them visible
            small = boxes[i][3] - boxes[i][1] < 4 * size
            font = _font(max(8, round(size * 0.8)) if small else size)
            text = _shorten(text, font, image.width - 2 * _pad(font) - 1)
            sides = (round(font.getlength(text)) + 2 * _pad(font), sum(font.getmetrics()))
            place = _place_tag(boxes[i], sides, image.size, taken[: len(tags)])
            taken[len(tags)] = place
            tags[i] = (place, text, font)
    for i in reversed(order):
        draw.rectangle(boxes[i], outline=colours[i], width=max(1, round(size / 6)))
    for i, (place, text, font) in reversed(tags.items()):
        edge = tuple(part // 2 for part in colours[i])  # separates tags of one colour
        draw.rectangle(place, fill=colours[i], outline=edge)
        ink = text_colour(colours[i])
        draw.text((place[0] + _pad(font), place[1]), text, fill=ink, font=font)
    return image


def _pad(font: ImageFont.FreeTypeFont) -> int:
    return max(2, int(font.size) // 5)


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    # the layout of a line cannot do line breaks
    text = " ".join(text[: 4 * _LONGEST_NAME].split())[:_LONGEST_NAME]
    if font.getlength(text) <= room:
        return text
    shown = bisect.bisect_right(
        range(1, len(text) + 1), room, key=lambda end: font.getlength(f"{text[:end]}…")
    )
    return f"{text[:shown]}…"


def _place_tag(
    box: Rectangle,
    sides: tuple[float, float],
    image_size: tuple[int, int],
    taken: NDArray[np.float64],
) -> Rectangle:
    """Choose the place along the box, within the image, where the tag hides least of the others."""
    (x0, y0, x1, y1), (width, height) = box, sides
    end_x, end_y = image_size[0] - 1.0, image_size[1] - 1.0
    places = []
    for x, y in (
        (x0, y0 - height),
        (x0, y0),
        (x1 - width, y0 - height),
        (x0, y1),
        (x1 - width, y1),
        (x1 - width, y0),
        (x0, y1 - height),
        (x1 - width, y1 - height),
    ):
        x = min(max(x, 0.0), max(end_x - width, 0.0))
        y = min(max(y, 0.0), max(end_y - height, 0.0))
        places.append((x, y, min(x + width, end_x), min(y + height, end_y)))
    corners = np.array(places)[:, None]
    sides_shared = np.minimum(corners[..., 2:], taken[:, 2:]) - np.maximum(
        corners[..., :2], taken[:, :2]
    )
    covered = sides_shared.clip(min=0.0).prod(axis=2).sum(axis=1)
    return places[int(covered.argmin())]


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Return two images beside each other, each under its title."""
    size = max(11, round(min(left.size) * 0.032))
    font, gap = _font(size), max(4, size // 3)
    bar = sum(font.getmetrics()) + gap
    canvas = Image.new(
        "RGB", (left.width + gap + right.width, bar + max(left.height, right.height)), _LIGHT
    )
    draw = ImageDraw.Draw(canvas)
    for x, image, title in zip((0, left.width + gap), (left, right), titles, strict=True):
        canvas.paste(image.convert("RGB"), (x, bar))
        text = _shorten(title, font, image.width - 2 * gap)
        draw.text((x + gap, gap // 2), text, fill=_DARK, font=font)
    return canvas
