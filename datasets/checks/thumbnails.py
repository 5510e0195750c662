"""Small images of offenders with their boxes, for the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from datasets.checks.kinds import BOXES, KINDS
from datasets.checks.ledger import Box, CheckedImage, Ledger, Offender
from datasets.images import READ_ERRORS, read_rgb
from util.draw import draw_boxes
from util.html import InlineImage, inline_image

_SHOWN = 6  # images of a kind
_SIDE = 300  # pixels, the longer one
_MARGIN = 0.4  # of the side, at most: grey around the image, where boxes reach past it
_CLOSE_UP, _NEAR = ("small_bbox", "vanishing_bbox"), 0.2  # of the image's longer side
_NO_CATEGORY = -(2**63)  # which no file can name
_BEYOND = 8  # pixels
_GREY = (128, 128, 128)
_AS_GIVEN, _MENDED = 0, 1  # colours


@dataclass(frozen=True)
class Thumbnail:
    """A small image, what it shows in full, and the line below it."""

    image: InlineImage
    alt: str
    caption: str


class Thumbnails:
    """Draws offenders of any split, each with the boxes in question."""

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self._images = {(ledger.split, p.id): p for ledger in ledgers for p in ledger.images}
        self._names = {ledger.split: ledger.class_names for ledger in ledgers}

    def of_kind(self, kind: str, found: Sequence[Offender]) -> Iterator[Thumbnail]:
        """Yield the first images that have a flaw and can be read."""
        shown: set[tuple[str, int]] = set()
        for offender in found[:2000]:
            key = (offender.split, -1 if offender.image_id is None else offender.image_id)
            if key in shown or key not in self._images or len(shown) == _SHOWN:
                continue
            thumbnail = self._thumbnail(kind, offender, self._images[key])
            if thumbnail:
                shown.add(key)
                yield thumbnail

    def _thumbnail(self, kind: str, offender: Offender, image: CheckedImage) -> Thumbnail | None:
        if image.facts.state != "sound":
            return None
        try:
            pixels = read_rgb(image.path, image.size)
        except READ_ERRORS:  # changed since it was decoded
            return None
        box_id = offender.annotation_id
        about_box = KINDS[kind].group == BOXES and box_id is not None
        boxes = [b for b in image.boxes if not about_box or b.id == box_id]
        if kind in _CLOSE_UP and boxes:
            pixels, boxes = _close_up(pixels, boxes[0])
        drawn = self._draw(pixels, boxes, offender.split, given=about_box)
        caption = f"{offender.split} {offender.place}"
        caption += f": {offender.detail}" if offender.detail else ""
        alt = f"{KINDS[kind].title}: {caption}; {len(boxes)} boxes drawn"
        return Thumbnail(inline_image(drawn, max_width=_SIDE), alt, caption)

    def _draw(
        self, pixels: Image.Image, boxes: Sequence[Box], split: str, *, given: bool
    ) -> Image.Image:
        """Return a small image with boxes: as `given` and as mended, or those of training."""
        scale = _SIDE / max(pixels.size)
        sides = [max(1, round(side * scale)) for side in pixels.size]
        small = pixels.resize((sides[0], sides[1]))
        rows, labels, names = [], [], []
        for box in boxes:
            name = self._names[split].get(box.category, "")
            versions = [(box.xywh, name, abs(box.category))]
            if given and box.mended:
                versions = [(box.raw, "as given", _AS_GIVEN), (box.xywh, "mended", _MENDED)]
            for (x, y, w, h), text, colour in versions:
                rows.append([min(x, x + w), min(y, y + h), max(x, x + w), max(y, y + h)])
                labels.append(colour)
                names.append(text)
        corners = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4) * scale
        margin = _margin(corners, small.size) if given else 0
        canvas = Image.new("RGB", (small.width + 2 * margin, small.height + 2 * margin), _GREY)
        canvas.paste(small, (margin, margin))
        return draw_boxes(canvas, corners + margin, labels, names)


def _close_up(pixels: Image.Image, box: Box) -> tuple[Image.Image, list[Box]]:
    """Return the part of an image around a small box, and the box in it, without a tag."""
    x, y, w, h = box.xywh
    side = round(max(_NEAR * max(pixels.size), 2 * max(w, h)))
    left, top = (
        round(min(max(0, start + size / 2 - side / 2), max(0, whole - side)))
        for start, size, whole in ((x, w, pixels.width), (y, h, pixels.height))
    )
    part = pixels.crop((left, top, min(pixels.width, left + side), min(pixels.height, top + side)))
    return part, [replace(box, xywh=(x - left, y - top, w, h), mended="", category=_NO_CATEGORY)]


def _margin(corners: Tensor, size: tuple[int, int]) -> int:
    """Return the pixels that are needed around an image to show where boxes [K,4] xyxy are."""
    if not len(corners):
        return 0
    past = torch.cat([-corners[:, :2], corners[:, 2:] - torch.tensor(size)]).max().item()
    return round(min(max(past + _BEYOND, 0), _MARGIN * _SIDE)) if past > 0 else 0
