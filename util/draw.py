"""Images with boxes, class names and scores."""

import colorsys
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# Between black and white one always has a contrast ratio of at least 4.5 (WCAG AA).
_DARK, _LIGHT = (0, 0, 0), (255, 255, 255)
_GOLDEN_RATIO = 0.618034


def label_colour(label: int) -> Colour:
    """Return the colour of a class: always the same, neighbours far apart in hue."""
    hue = (0.02 + label * _GOLDEN_RATIO) % 1.0
    saturation = (0.85, 0.65, 0.95)[label % 3]
    value = (1.0, 0.85)[label // 3 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(background: Colour) -> Colour:
    """Return dark or light, whichever has the greater contrast ratio (WCAG 2)."""
    ours = _luminance(background)
    against_light = (_luminance(_LIGHT) + 0.05) / (ours + 0.05)
    against_dark = (ours + 0.05) / (_luminance(_DARK) + 0.05)
    return _LIGHT if against_light > against_dark else _DARK


def _luminance(colour: Colour) -> float:
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3294.6 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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

    Shape: boxes_xyxy [K,4] in pixels; `labels` (which choose the colours), `names` and `scores`
    have K entries. Boxes are clipped to the image; those outside it are left out. Where tags
    compete for a place, those of higher score choose first.
    """
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(image)
    size = max(9, round(min(image.size) * 0.026))
    width = max(1, round(size / 6))
    clipped = {
        i: box
        for i, corners in enumerate(boxes_xyxy.reshape(-1, 4).tolist())
        if (box := _clip(corners, image.size)) is not None
    }
    order = list(clipped)
    if scores is not None:
        order.sort(key=lambda i: scores[i], reverse=True)
    tags: list[_Tag] = []
    for i in order:
        text = names[i] if scores is None else f"{names[i]} {scores[i]:.2f}".lstrip()
        if text:
            colour = label_colour(int(labels[i]))
            tags.append(_make_tag(text, colour, clipped[i], size, image.size, tags))
    for i in reversed(order):
        draw.rectangle(clipped[i], outline=label_colour(int(labels[i])), width=width)
    for tag in reversed(tags):
        edge = (tag.colour[0] // 2, tag.colour[1] // 2, tag.colour[2] // 2)
        draw.rectangle(tag.place, fill=tag.colour, outline=edge)  # parts tags of one colour
        start = (tag.place[0] + tag.pad, tag.place[1])
        draw.text(start, tag.text, fill=text_colour(tag.colour), font=tag.font)
    return image


def _clip(box: Sequence[float], size: tuple[int, int]) -> Rectangle | None:
    """Return the part of a box within the image in pixel indices, None if there is none."""
    x0, y0, x1, y1 = box
    if not (x0 < size[0] and y0 < size[1] and x1 > 0 and y1 > 0 and x0 <= x1 and y0 <= y1):
        return None
    right, bottom = size[0] - 1.0, size[1] - 1.0
    return min(max(x0, 0.0), right), min(max(y0, 0.0), bottom), min(x1, right), min(y1, bottom)


@dataclass(frozen=True)
class _Tag:
    text: str
    colour: Colour
    font: ImageFont.FreeTypeFont
    pad: int
    place: Rectangle


def _make_tag(
    text: str,
    colour: Colour,
    box: Rectangle,
    size: int,
    image_size: tuple[int, int],
    others: Sequence[_Tag],
) -> _Tag:
    # Small objects stand close together: smaller tags leave more of them visible.
    if box[3] - box[1] < 4 * size:
        size = max(8, round(size * 0.8))
    font, pad = _font(size), max(2, size // 5)
    text = _shorten(text, font, image_size[0] - 2 * pad - 1)
    ascent, descent = font.getmetrics()
    width, height = round(font.getlength(text)) + 2 * pad, ascent + descent
    place = _place_tag(box, width, height, image_size, [other.place for other in others])
    return _Tag(text, colour, font, pad, place)


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    text = " ".join(text.split())  # a line break is more than the layout of a line can do
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _place_tag(
    box: Rectangle,
    width: float,
    height: float,
    image_size: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Choose the place along the box, within the image, that covers other tags least."""
    x0, y0, x1, y1 = box
    left, right = x0, x1 - width
    candidates = (
        (left, y0 - height), (left, y0), (right, y0 - height), (left, y1),
        (right, y1), (right, y0), (left, y1 - height), (right, y1 - height),
    )  # fmt: skip
    best, least = None, float("inf")
    for x, y in candidates:
        x = min(max(x, 0.0), max(image_size[0] - 1 - width, 0.0))
        y = min(max(y, 0.0), max(image_size[1] - 1 - height, 0.0))
        place = (
            x,
            y,
            min(x + width, image_size[0] - 1.0),
            min(y + height, image_size[1] - 1.0),
        )
        covered = sum(_overlap(place, other) for other in taken)
        if covered < least:
            best, least = place, covered
    assert best is not None
    return best


def _overlap(a: Rectangle, b: Rectangle) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


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
