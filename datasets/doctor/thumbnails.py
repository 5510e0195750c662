"""Small pictures of offenders with their boxes, for the page."""

from collections.abc import Iterator, Sequence
from html import escape

import torch
from PIL import Image

from datasets.doctor.kinds import BOXES, KINDS
from datasets.doctor.ledger import Box, Ledger, Offender, Picture
from datasets.image_reading import READ_ERRORS, read_rgb
from util.draw import draw_boxes
from util.page import picture as embedded

_SHOWN = 6  # pictures of a kind
_SIDE = 300  # pixels, the longer one
_MARGIN = 0.15  # of the side, around the picture, where a box may reach past it
_GREY = (128, 128, 128)
_AS_GIVEN, _MENDED = 0, 1  # colours


class Thumbnails:
    """Draws offenders of any split, each with the boxes that are meant."""

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self._pictures = {(ledger.split, p.id): p for ledger in ledgers for p in ledger.pictures}
        self._names = {ledger.split: ledger.class_names for ledger in ledgers}

    def figures(self, kind: str, found: Sequence[Offender]) -> Iterator[str]:
        """Yield figures of the first pictures that have a flaw and can be read."""
        shown: set[tuple[str, int]] = set()
        for offender in found[:2000]:
            key = (offender.split, -1 if offender.image_id is None else offender.image_id)
            if key in shown or key not in self._pictures or len(shown) == _SHOWN:
                continue
            figure = self._figure(kind, offender, self._pictures[key])
            if figure:
                shown.add(key)
                yield figure

    def _figure(self, kind: str, offender: Offender, picture: Picture) -> str | None:
        if picture.facts.state != "sound":
            return None
        try:
            image = read_rgb(picture.path, picture.size)
        except READ_ERRORS:  # changed since it was decoded
            return None
        about_box = KINDS[kind].group == BOXES and offender.annotation_id is not None
        boxes = [b for b in picture.boxes if not about_box or b.id == offender.annotation_id]
        thumbnail = self._draw(image, boxes, offender.split, given=about_box)
        place = f"{offender.split} {offender.place}"
        text = f"{place}: {offender.detail}" if offender.detail else place
        told = f"{KINDS[kind].title}: {text}; {len(boxes)} boxes drawn"
        return (
            f"<figure>{embedded(thumbnail, told, width=_SIDE)}"
            f"<figcaption>{escape(text)}</figcaption></figure>"
        )

    def _draw(
        self, image: Image.Image, boxes: Sequence[Box], split: str, *, given: bool
    ) -> Image.Image:
        """Return a small picture with boxes: as `given` and as mended, or those of training."""
        scale = _SIDE / max(image.size)
        margin = round(_MARGIN * _SIDE) if given else 0
        small = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        )
        canvas = Image.new("RGB", (small.width + 2 * margin, small.height + 2 * margin), _GREY)
        canvas.paste(small, (margin, margin))
        rows, labels, names = [], [], []
        for box in boxes:
            name = self._names[split].get(box.category, "")
            versions = [(box.xywh, name, box.category)]
            if given:
                versions = [(box.raw, "as given", _AS_GIVEN)]
                versions += [(box.xywh, "mended", _MENDED)] if box.mended else []
            for (x, y, w, h), text, colour in versions:
                rows.append([x, y, x + w, y + h])
                labels.append(colour)
                names.append(text)
        corners = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4) * scale + margin
        return draw_boxes(canvas, corners, labels, names)
