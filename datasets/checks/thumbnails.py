"""Small images of findings with their boxes, for the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from datasets.checks.findings import Finding
from datasets.checks.kinds import BOXES, KINDS
from datasets.checks.split_report import SplitReport, printable
from datasets.images import READ_ERRORS, read_rgb
from util.draw import draw_boxes
from util.html import InlineImage, inline_image

_SHOWN = 6  # images of a kind
_SIDE = 300  # pixels, the longer one
_MARGIN = 0.4  # of the side, at most: grey around the image, where boxes extend past it
_CLOSE_UP, _NEAR = ("small_bbox", "vanishing_bbox"), 0.2  # of the image's longer side
_BEYOND = 8  # pixels
_GREY = (128, 128, 128)
_AS_GIVEN, _FIXED = 0, 1  # colours


@dataclass(frozen=True)
class _Box:
    """A box to draw; `given` is xywh as in the file, if other than `xywh` in pixels."""

    xywh: list[float]
    name: str = ""
    colour: int = 0
    given: list[float] | None = None


@dataclass(frozen=True)
class Thumbnail:
    """A small image, what it shows in full, and the line below it."""

    image: InlineImage
    alt: str
    caption: str


class Thumbnails:
    """Draws findings of any split, each with the boxes in question."""

    def __init__(self, splits: Sequence[SplitReport]) -> None:
        self._images = {
            (report.split, image_id): (report, i)
            for report in splits
            for i, image_id in enumerate(report.images.ids.tolist())
        }

    def of_kind(self, kind: str, found: Sequence[Finding]) -> Iterator[Thumbnail]:
        """Yield the first images that have a flaw and can be read."""
        shown: set[tuple[str, int]] = set()
        for finding in found[:2000]:
            key = (finding.split, -1 if finding.image_id is None else finding.image_id)
            if key in shown or key not in self._images or len(shown) == _SHOWN:
                continue
            thumbnail = self._thumbnail(kind, finding, *self._images[key])
            if thumbnail:
                shown.add(key)
                yield thumbnail

    def _thumbnail(
        self, kind: str, finding: Finding, report: SplitReport, image: int
    ) -> Thumbnail | None:
        if report.facts[image].state != "sound":
            return None
        height, width = report.images.sizes[image].tolist()
        try:
            pixels = read_rgb(report.path(image), (height, width))
        except READ_ERRORS:  # changed since it was decoded
            return None
        about_box = KINDS[kind].group == BOXES and finding.annotation_id is not None
        boxes = [
            _box(report, row)
            for row in report.boxes_of(image).tolist()
            if not about_box or report.annotations.ids[row] == finding.annotation_id
        ]
        if kind in _CLOSE_UP and boxes:
            pixels, boxes = _close_up(pixels, boxes[0])
        drawn = _draw(pixels, boxes, given=about_box)
        caption = f"{finding.split} {finding.place}"
        caption += f": {finding.detail}" if finding.detail else ""
        alt = f"{KINDS[kind].title}: {caption}; {len(boxes)} boxes drawn"
        return Thumbnail(inline_image(drawn, max_width=_SIDE), alt, caption)


def _box(report: SplitReport, row: int) -> _Box:
    label = report.annotations.labels[row]
    given = report.annotations.xywh[row].tolist() if report.fixed[row] else None
    name = printable(report.classes.names[label])
    return _Box(report.xywh[row].tolist(), name, abs(report.classes.ids[label]), given)


def _draw(pixels: Image.Image, boxes: Sequence[_Box], *, given: bool) -> Image.Image:
    """Return a small image with boxes: as `given` and as fixed, or those of training."""
    scale = _SIDE / max(pixels.size)
    sides = [max(1, round(side * scale)) for side in pixels.size]
    small = pixels.resize((sides[0], sides[1]))
    rows, labels, names = [], [], []
    for box in boxes:
        versions = [(box.xywh, box.name, box.colour)]
        if given and box.given:
            versions = [(box.given, "as given", _AS_GIVEN), (box.xywh, "fixed", _FIXED)]
        for (x, y, w, h), text, colour in versions:
            rows.append([min(x, x + w), min(y, y + h), max(x, x + w), max(y, y + h)])
            labels.append(colour)
            names.append(text)
    corners = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4) * scale
    margin = _margin(corners, small.size) if given else 0
    canvas = Image.new("RGB", (small.width + 2 * margin, small.height + 2 * margin), _GREY)
    canvas.paste(small, (margin, margin))
    return draw_boxes(canvas, corners + margin, labels, names)


def _close_up(pixels: Image.Image, box: _Box) -> tuple[Image.Image, list[_Box]]:
    """Return the part of an image around a small box, and the box in it, without a tag."""
    x, y, w, h = box.xywh
    side = round(max(_NEAR * max(pixels.size), 2 * max(w, h)))
    left, top = (
        round(min(max(0, start + size / 2 - side / 2), max(0, whole - side)))
        for start, size, whole in ((x, w, pixels.width), (y, h, pixels.height))
    )
    part = pixels.crop((left, top, min(pixels.width, left + side), min(pixels.height, top + side)))
    return part, [_Box([x - left, y - top, w, h])]


def _margin(corners: Tensor, size: tuple[int, int]) -> int:
    """Return the pixels that are needed around an image to show where boxes [K,4] xyxy are."""
    if not len(corners):
        return 0
    past = torch.cat([-corners[:, :2], corners[:, 2:] - torch.tensor(size)]).max().item()
    return round(min(max(past + _BEYOND, 0), _MARGIN * _SIDE)) if past > 0 else 0
