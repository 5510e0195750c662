"""Check boxes: first what the numbers of the whole set mean, then each box in its image."""

from dataclasses import dataclass
from math import floor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datasets.checks.ledger import XYWH, Box, CheckedImage, Ledger
from datasets.sample import resized_size

Layout = Literal["xywh", "xyxy", "cxcywh"]
Pairs = list[tuple[CheckedImage, Box]]

_LEAST = 10  # boxes from which a set has statistics
_SOUND, _CONVINCING = 0.8, 0.9  # shares of boxes that fit their images
_PAST_WHOLE = 1.5  # of an image: a fraction still, of a box that reaches past the edge
_LEAST_AT_EDGE = 5  # boxes at 1 (or -1) where others would be at 0
_CELL = 8  # pixels of the finest feature level's cells
_NEW_AREA = ("normalised_bbox", "xyxy_bbox", "cxcywh_bbox")  # the old one is of other numbers
_SLACK = 1  # pixels past the edge that training does not tell of either


@dataclass(frozen=True)
class Limits:
    """What the model and its training set: queries, the smallest short side, the longest side."""

    num_queries: int
    short_side: int
    max_size: int


def check_boxes(ledger: Ledger, limits: Limits) -> None:
    """Note the flaws of all boxes, and bring those that can be mended into pixels xywh."""
    pairs = [(image, box) for image in ledger.images for box in image.boxes]
    fractions: Pairs = []
    pixels: Pairs = []
    for pair in pairs:
        (fractions if _is_fraction(pair[1].raw) else pixels).append(pair)
    if len(fractions) >= max(_LEAST, _CONVINCING * len(pairs)):  # a whole image is 0 0 1 1
        fractions += [pair for pair in pixels if max(map(abs, pair[1].raw)) <= _PAST_WHOLE]
        pixels = [pair for pair in pixels if max(map(abs, pair[1].raw)) > _PAST_WHOLE]
    _read_fractions(ledger, fractions)
    _read_pixels(ledger, pixels)
    _find_shifted(ledger, pixels)
    for image, box in pairs:
        if not box.flaw:
            _check_box(ledger, image, box, limits)
    for image in ledger.images:
        _find_repeated(ledger, image)
    for _, box in pairs:
        if box.flaw:
            ledger.drop("annotations", box.position, box.flaw)
        else:
            _note_changes(ledger, box)
    _count_boxes(ledger, limits)


def _count_boxes(ledger: Ledger, limits: Limits) -> None:
    for image in ledger.images:
        count = len(image.usable_boxes)
        if count > limits.num_queries:
            ledger.tell_image("too_many_boxes", image, f"{count} boxes")
        if not count and image.facts.state == "sound":
            ledger.tell_image("no_boxes", image)


def _is_fraction(raw: XYWH) -> bool:
    within = all(0 <= value <= 1 for value in raw)
    return within and raw[2] > 0 and raw[3] > 0 and any(value % 1 for value in raw)


def _read_fractions(ledger: Ledger, pairs: Pairs) -> None:
    values = np.array([box.raw for _, box in pairs]).reshape(-1, 4)
    layout = find_layout(values, np.ones((len(pairs), 2)), slack=0.01)
    for image, box in pairs:
        ledger.tell_box("normalised_bbox", image, box)
        if image.size is None:
            box.flaw = "normalised_bbox"
            continue
        height, width = image.size
        x, y, w, h = _as_xywh(box.raw, layout)
        box.xywh = (x * width, y * height, w * width, h * height)
        box.mended = "normalised_bbox"


def _read_pixels(ledger: Ledger, pairs: Pairs) -> None:
    known = [(box.raw, image.size[::-1]) for image, box in pairs if image.size]
    values = np.array([raw for raw, _ in known]).reshape(-1, 4)
    bounds = np.array([size for _, size in known]).reshape(-1, 2)
    layout = find_layout(values, bounds, slack=_SLACK)
    if layout == "xywh":
        return
    for image, box in pairs:
        ledger.tell_box(f"{layout}_bbox", image, box)
        box.xywh, box.mended = _as_xywh(box.raw, layout), f"{layout}_bbox"


def _as_xywh(raw: XYWH, layout: Layout) -> XYWH:
    a, b, c, d = raw
    if layout == "xyxy":
        return a, b, c - a, d - b
    return (a - c / 2, b - d / 2, c, d) if layout == "cxcywh" else raw


def find_layout(
    values: NDArray[np.float64], bounds: NDArray[np.float64], *, slack: float
) -> Layout:
    """Return what four numbers a box mean, by the share of boxes that fit their images.

    Shape: values [A,4]; bounds [A,2] (width, height) in the same unit. Sound data fits as xywh;
    another layout is believed where that fails for many boxes and the other holds for nearly all.
    """
    if len(values) < _LEAST:
        return "xywh"
    first, last = values[:, :2], values[:, 2:]
    corners = {
        "xywh": (first, first + last),
        "xyxy": (first, last),
        "cxcywh": (first - last / 2, first + last / 2),
    }
    share = {
        layout: float(
            ((low >= -slack) & (high <= bounds + slack) & (high > low)).all(axis=1).mean()
        )
        for layout, (low, high) in corners.items()
    }
    if share["xywh"] > _SOUND or max(share.values()) < _CONVINCING:
        return "xywh"
    return "xyxy" if share["xyxy"] >= share["cxcywh"] else "cxcywh"


def _find_shifted(ledger: Ledger, pairs: Pairs) -> None:
    """Tell sets that are a pixel off: whole numbers, many at 1 (or -1) and none below."""
    corners = np.array([box.xywh[:2] for _, box in pairs]).reshape(-1, 2)
    if len(corners) < _LEAST or (corners % 1).any() or corners.min() not in (1, -1):
        return
    edge = int(corners.min())
    at_edge, next_to_it = (int((corners == n).any(axis=1).sum()) for n in (edge, edge + 1))
    if at_edge < max(_LEAST_AT_EDGE, len(corners) // 50) or at_edge < 3 * next_to_it:
        return
    kind = "one_based" if edge == 1 else "zero_based"
    for image, box in pairs:
        ledger.tell_box(kind, image, box)
        x, y, w, h = box.xywh
        box.xywh, box.mended = (x - edge, y - edge, w, h), kind


def _find_repeated(ledger: Ledger, image: CheckedImage) -> None:
    """Let all but the first go of boxes with the same numbers and class."""
    first: dict[tuple[XYWH, int, bool], int] = {}
    for box in image.boxes:
        if box.flaw:
            continue
        same = first.setdefault((box.xywh, box.category, box.crowd), box.id)
        if same != box.id:
            ledger.tell_box("repeated_bbox", image, box, f"as annotation {same}")
            box.flaw = "repeated_bbox"


def _check_box(ledger: Ledger, image: CheckedImage, box: Box, limits: Limits) -> None:
    x, y, w, h = box.xywh
    if w <= 0 or h <= 0:
        box.flaw = "negative_bbox" if min(w, h) < 0 else "zero_bbox"
    elif image.size is not None:
        height, width = image.size
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + w, width), min(y + h, height)
        if right <= left or bottom <= top:
            box.flaw = "outside_bbox"
        else:
            if x < -_SLACK or y < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
                ledger.tell_box("past_edge", image, box, _past(box, image))
                box.xywh = (left, top, right - left, bottom - top)
                box.mended = box.mended or "past_edge"
            if not box.crowd:
                side = min(right - left, bottom - top) * _zoom(height, width, limits)
                _judge_side(ledger, image, box, side)
            return
    if box.flaw:
        ledger.tell_box(box.flaw, image, box)


def _past(box: Box, image: CheckedImage) -> str:
    assert image.size is not None
    numbers = ", ".join(f"{value:g}" for value in box.raw)
    return f"[{numbers}] in {image.size[1]} x {image.size[0]}"


def _zoom(height: int, width: int, limits: Limits) -> float:
    new = resized_size(height, width, limits.short_side, limits.max_size)
    return min(new) / min(height, width)


def _judge_side(ledger: Ledger, image: CheckedImage, box: Box, side: float) -> None:
    """Note a box whose shorter side, in pixels at training size, is too little to see."""
    kind = "vanishing_bbox" if side < 1 else "small_bbox" if side < _CELL else ""
    if kind:
        shown = floor(side * 100) / 100  # never up to the limit itself
        ledger.tell_box(kind, image, box, f"{shown:g} pixels at the smallest training size")
    if side < 1:
        box.flaw = kind


def _note_changes(ledger: Ledger, box: Box) -> None:
    """Let a corrected copy hold what was made of a box, and an area where there is none."""
    values: dict[str, object] = {}
    whole = box.xywh[2] * box.xywh[3]
    if box.mended:
        values["bbox"] = [round(value, 6) for value in box.xywh]
    if box.area is None or box.mended in _NEW_AREA:
        values["area"] = round(whole, 6)
    elif box.mended:
        values["area"] = round(min(box.area, whole), 6)
    if values:
        ledger.change("annotations", box.position, box.mended or "missing_key", values)
