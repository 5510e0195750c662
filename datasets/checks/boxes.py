"""Check boxes: first what the numbers of the whole set mean, then each box in its image."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import floor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import BoolArray, FloatArray, IntArray
from datasets.checks.findings import SplitReport
from datasets.sample import resized_size
from datasets.tiles import Tiling, boxes_of_tiles, tiles_of

Layout = Literal["xywh", "xyxy", "cxcywh"]

_MIN_BOXES = 10  # from which a set has statistics
_SOUND, _CONVINCING = 0.8, 0.9  # shares of boxes that fit their images
_PAST_WHOLE = 1.5  # of an image: still a fraction, of a box that extends past the edge
_MIN_AT_EDGE = 5  # boxes at 1 (or -1) where others would be at 0
_MANY_BOXES, _MANY_IMAGES = 50, 10  # which do not all lie in one corner by chance
_CORNER = 0.6  # of width and height
_CELL = 8  # pixels of the finest feature level's cells
_AT_ONCE = 1 << 18  # boxes; a set may have many more
_SLACK = 1  # pixels past the edge that are not worth a word


@dataclass(frozen=True)
class Limits:
    """The model's queries, and the smallest short side and largest long side of its training.

    With `tiling`, these are of the tiles of images.
    """

    num_queries: int
    short_side: int
    max_size: int
    tiling: Tiling | None = None

    def zoom(self, height: int, width: int) -> float:
        """Return the factor on the pixels of an image of this size, 1 where that is unknown."""
        if self.tiling is not None:
            height, width = min(height, self.tiling.size), min(width, self.tiling.size)
        if not height or not width:
            return 1
        seen = resized_size(height, width, self.short_side, self.max_size)
        return min(seen) / min(height, width)


def check_boxes(report: SplitReport) -> None:
    """Judge each annotation by its numbers and the size of its image; see `SplitReport`."""
    found = report.annotations
    size = report.images.sizes[found.image][:, ::-1].astype(np.float64)  # [A,2] width, height
    known = np.asarray(size.all(axis=1))
    report.xywh = found.xywh.copy()
    report.flaw, report.fixed = (np.full(len(found.ids), "", dtype=object) for _ in range(2))
    fraction = _are_fractions(found.xywh)
    _read_fractions(report, fraction, size, known)
    _read_pixels(report, ~fraction, size, known)
    _find_shifted(report, ~fraction)

    side = report.xywh[:, 2:].min(axis=1, initial=np.inf)
    outside = ~_is_visible(report.xywh, size) & known
    useless = {"negative_bbox": side < 0, "zero_bbox": side == 0, "outside_bbox": outside}
    for kind, chosen in useless.items():
        left_out = np.asarray(chosen & (report.flaw == ""))
        report.report_boxes(kind, left_out)
        report.flaw[left_out] = kind

    low, high = report.xywh[:, :2], report.xywh[:, :2] + report.xywh[:, 2:]
    past = ((low < -_SLACK) | (high > size + _SLACK)).any(axis=1) & known & (report.flaw == "")

    def in_image(row: int) -> str:
        return f"{report.numbers(row)} in {size[row, 0]:g} x {size[row, 1]:g}"

    report.report_boxes("past_edge", past, in_image)
    low, high = low.clip(0), np.minimum(high, size)
    report.xywh[past] = np.concatenate([low, high - low], axis=1)[past]
    report.fixed[past & (report.fixed == "")] = "past_edge"

    _find_in_corner(report, np.asarray((report.flaw == "") & (report.fixed == "") & known))

    # Training takes the numbers as the file has them. Images that are not there, or known to be
    # unreadable, are never seen.
    report.trained = _is_visible(found.xywh, size) & (found.xywh[:, 2:] > 0).all(axis=1)
    report.trained &= ~found.crowd & report.sound[found.image]
    _find_crowds(report)
    if report.section("annotations") or len(found.ids):  # a set to predict on has none
        if not report.trained.any():
            report.report_places("no_usable_box", [(report.source.place.name, "")])
            return
        trained = np.asarray(report.flaw == "") & ~found.crowd
        empty = np.bincount(found.image[trained], minlength=len(report.images.ids)) == 0
        empty[[i for i, f in report.facts.items() if f.state in ("missing", "unreadable")]] = False
        report.report_images("no_boxes", np.flatnonzero(empty))


def _find_crowds(report: SplitReport) -> None:
    """Report crowds where they are most of the annotations: some tools flag every mask so."""
    crowd = report.annotations.crowd
    if 2 * crowd.sum() > len(crowd):
        report.report_boxes("mostly_crowd", crowd)


def clip(xywh: FloatArray, size: FloatArray) -> NDArray[np.float32]:
    """Return boxes [A,4] clipped to images of `size` [A,2] (width, height; 0: unknown), as xyxy."""
    bound = np.where(size > 0, size, np.inf)
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    return np.concatenate([low.clip(0, bound), high.clip(0, bound)], axis=1).astype(np.float32)


def clip_some(report: SplitReport, rows: IntArray) -> NDArray[np.float32]:
    """Return the annotations at some positions [B] as boxes clipped to their images [B,4]."""
    found, boxes = report.annotations, np.empty((len(rows), 4), dtype=np.float32)
    for part in _parts(len(rows)):
        size = report.images.sizes[found.image[rows[part]]][:, ::-1].astype(np.float64)
        boxes[part] = clip(found.xywh[rows[part]], size)
    return boxes


def _is_visible(xywh: FloatArray, size: FloatArray) -> BoolArray:
    """Return which boxes [A,4] have a part in images of `size` [A,2], as `clip` takes them."""
    parts = [has_area(clip(xywh[part], size[part])) for part in _parts(len(xywh))]
    return np.concatenate([np.zeros(0, dtype=np.bool_), *parts])


def _parts(count: int) -> Iterator[slice]:
    """Yield parts of arrays whose intermediate results would take gigabytes together."""
    return (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))


def has_area(xyxy: NDArray[np.float32]) -> BoolArray:
    """Return which boxes [A,4] have a width and a height [A]."""
    return np.asarray((xyxy[:, 2:] > xyxy[:, :2]).all(axis=1))


def _are_fractions(xywh: FloatArray) -> BoolArray:
    """Return which boxes [A,4] are fractions of their image, from 0 to 1 and not all whole."""
    within = ((xywh >= 0) & (xywh <= 1)).all(axis=1) & (xywh[:, 2:] > 0).all(axis=1)
    fraction = np.asarray(within & (xywh % 1).any(axis=1))
    if fraction.sum() >= max(_MIN_BOXES, _CONVINCING * len(xywh)):  # a whole image is 0 0 1 1
        fraction |= (np.abs(xywh) <= _PAST_WHOLE).all(axis=1)
    return fraction


def _read_fractions(
    report: SplitReport, chosen: BoolArray, size: FloatArray, known: BoolArray
) -> None:
    values = report.xywh[chosen]
    layout = find_layout(values, np.ones((len(values), 2)), slack=0.01)
    report.report_boxes("normalised_bbox", chosen)
    report.xywh[chosen] = _as_xywh(values, layout) * np.tile(size[chosen], 2)
    report.fixed[chosen] = "normalised_bbox"
    report.flaw[chosen & ~known] = "normalised_bbox"


def _read_pixels(
    report: SplitReport, chosen: BoolArray, size: FloatArray, known: BoolArray
) -> None:
    judged = np.asarray(chosen & known)
    values, bounds = (a if judged.all() else a[judged] for a in (report.xywh, size))
    layout = find_layout(values, bounds, slack=_SLACK)
    if layout != "xywh":
        report.report_boxes(f"{layout}_bbox", chosen)
        report.xywh[chosen] = _as_xywh(report.xywh[chosen], layout)
        report.fixed[chosen] = f"{layout}_bbox"


def _as_xywh(values: FloatArray, layout: Layout) -> FloatArray:
    first, last = values[:, :2], values[:, 2:]
    if layout == "xyxy":
        return np.concatenate([first, last - first], axis=1)
    return np.concatenate([first - last / 2, last], axis=1) if layout == "cxcywh" else values


def find_layout(values: FloatArray, bounds: FloatArray, *, slack: float) -> Layout:
    """Return what four numbers a box mean, by the share of boxes that fit their images.

    Shape: values [A,4]; bounds [A,2] (width, height) in the same unit. Sound data fits as xywh;
    another layout is believed if that fails for many boxes and the other holds for nearly all.
    """
    if len(values) < _MIN_BOXES:
        return "xywh"
    fitting: Counter[Layout] = Counter()
    for part in _parts(len(values)):
        first, last, bound = values[part, :2], values[part, 2:], bounds[part] + slack
        corners: dict[Layout, tuple[FloatArray, FloatArray]] = {
            "xywh": (first, first + last),
            "xyxy": (first, last),
            "cxcywh": (first - last / 2, first + last / 2),
        }
        for layout, (low, high) in corners.items():
            fits = ((low >= -slack) & (high <= bound) & (high > low)).all(axis=1)
            fitting[layout] += int(fits.sum())
    share = {layout: count / len(values) for layout, count in fitting.items()}
    if share["xywh"] > _SOUND or max(share.values()) < _CONVINCING:
        return "xywh"
    return "xyxy" if share["xyxy"] >= share["cxcywh"] else "cxcywh"


def _find_shifted(report: SplitReport, chosen: BoolArray) -> None:
    """Report sets that are a pixel off: whole numbers, many at 1 (or -1) and none below."""
    corners = report.xywh[chosen, :2]
    if len(corners) < _MIN_BOXES or (corners % 1).any() or corners.min() not in (1, -1):
        return
    edge = int(corners.min())
    at_edge, next_to_it = (int((corners == n).any(axis=1).sum()) for n in (edge, edge + 1))
    if at_edge < max(_MIN_AT_EDGE, len(corners) // 50) or at_edge < 3 * next_to_it:
        return
    kind = "one_based" if edge == 1 else "zero_based"
    report.report_boxes(kind, chosen)
    report.xywh[chosen, :2] -= edge
    report.fixed[chosen] = kind


def _find_in_corner(report: SplitReport, chosen: BoolArray) -> None:
    """Report sets whose boxes all lie top left, as those of smaller versions of the images do."""
    image = report.annotations.image
    chosen = chosen & ~report.annotations.crowd
    if chosen.sum() < _MANY_BOXES or len(np.unique(image[chosen])) < _MANY_IMAGES:
        return
    reach = np.zeros(2)
    for part in _parts(len(chosen)):
        box = report.annotations.xywh[part][chosen[part]]
        size = report.images.sizes[image[part]][chosen[part], ::-1]
        reach = np.maximum(reach, ((box[:, :2] + box[:, 2:]) / size).max(axis=0, initial=0))
    if reach.max() < _CORNER:
        detail = f"none reaches past {reach[0]:.0%} of the width and {reach[1]:.0%} of the height"
        report.report_places("corner_bbox", [(report.source.place.name, detail)])


def check_learning(report: SplitReport, limits: Limits) -> None:
    """Report boxes that can be read, but that training learns little or nothing from."""
    found = report.annotations
    sizes, index = np.unique(report.images.sizes, axis=0, return_inverse=True)
    zoom = np.array([limits.zoom(*some) for some in sizes.tolist()])
    size = report.images.sizes[found.image][:, ::-1]
    low, high = report.xywh[:, :2], report.xywh[:, :2] + report.xywh[:, 2:]
    side = (np.minimum(high, size) - low.clip(0)).min(axis=1, initial=np.inf)
    side *= zoom[index.reshape(-1)[found.image]]
    judged = np.asarray(report.flaw == "") & ~found.crowd & (size > 0).all(axis=1)

    def in_training(row: int) -> str:
        shown = floor(side[row] * 100) / 100  # never up to the limit itself
        return f"{shown:g} pixels at the smallest training size"

    report.report_boxes("small_bbox", judged & (side >= 1) & (side < _CELL), in_training)
    report.report_boxes("vanishing_bbox", judged & (side < 1), in_training)
    report.flaw[judged & (side < 1)] = "vanishing_bbox"
    _find_repeated(report)
    counts, where = report.boxes_per_image(), "boxes"
    if limits.tiling is not None:
        where = "boxes in a tile"
        for i in np.flatnonzero(counts > limits.num_queries).tolist():
            counts[i] = _most_in_a_tile(report, i, limits.tiling)
    report.report_images(
        "too_many_boxes",
        np.flatnonzero(counts > limits.num_queries),
        lambda i: f"{counts[i]} {where}",
    )


def _most_in_a_tile(report: SplitReport, image: int, tiling: Tiling) -> int:
    """Return the most boxes that training takes of a tile of an image."""
    rows = report.rows_by_image[image]
    rows = rows[report.trained[rows]]
    height, width = report.images.sizes[image].tolist()
    if not height or not width:
        return len(rows)
    sizes = np.array([[width, height]], dtype=np.float64).repeat(len(rows), axis=0)
    boxes = clip(report.annotations.xywh[rows], sizes)
    counted = boxes_of_tiles(boxes, tiles_of(height, width, tiling), tiling.min_seen)
    return max(len(some) for some in counted)


def _find_repeated(report: SplitReport) -> None:
    """Leave out all but the first of boxes with the same numbers, image and class."""
    found = report.annotations
    rows = np.flatnonzero(report.flaw == "")
    keys = zip(
        found.image[rows].tolist(),
        found.labels[rows].tolist(),
        found.crowd[rows].tolist(),
        map(tuple, report.xywh[rows].tolist()),
        strict=True,
    )
    first: dict[object, int] = {}
    same_as = {
        row: original
        for row, key in zip(rows.tolist(), keys, strict=True)
        if (original := first.setdefault(key, row)) != row
    }
    repeated = np.isin(np.arange(len(found.ids)), list(same_as))
    report.report_boxes(
        "repeated_bbox", repeated, lambda row: f"as annotation {found.ids[same_as[row]]}"
    )
    report.flaw[repeated] = "repeated_bbox"
