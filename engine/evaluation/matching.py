"""COCO's matching of detections to ground truth, for all images at once, in NumPy.

The rules, and every rounding, are those of pycocotools' COCOeval. Legend: D detections, G
annotations, A area ranges, T IoU thresholds, N detections that count, C of them that overlap an
annotation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0.0, 1.0, 101)
AREA_RANGES: Floats = np.array(
    [[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]], dtype=np.float64
)  # all, small, medium, large; square pixels
_PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Truth:
    """Annotations in columns, in the file's order.

    Shape: image_ids [I] and category_ids [K], ascending; image and category [G], positions in
    those; box [G,4] as (x, y, w, h) in pixels; area [G]; crowd [G].
    """

    image_ids: Ints
    category_ids: Ints
    image: Ints
    category: Ints
    box: Floats
    area: Floats
    crowd: Bools


@dataclass(frozen=True)
class Detected:
    """Detections in columns. Shape: image, category [D], positions in `Truth`'s; box [D,4]."""

    image: Ints
    category: Ints
    box: Floats  # (x, y, w, h) in pixels
    score: Floats

    @cached_property
    def area(self) -> Floats:
        """Square pixels [D]."""
        return np.asarray(self.box[:, 2] * self.box[:, 3])

    def select(self, keep: Bools | Ints) -> "Detected":
        """Return some of them."""
        return Detected(*(getattr(self, f.name)[keep] for f in fields(self)))


@dataclass(frozen=True)
class Matches:
    """Which detection found which annotation.

    Shape: order [N], the detections that count, by category and there by falling score; rank [N]
    in its image and category; candidate [C], positions in `order`; gt [C,A,T], the annotation
    found or -1; ignored [G,A], annotations that neither count nor harm who finds them. What is no
    candidate found nothing.
    """

    order: Ints
    rank: Ints
    candidate: Ints
    gt: Ints
    ignored: Bools

    def found(self, area: int = 0, threshold: int = 0) -> Ints:
        """Return the annotation found by each of `order` [N], -1 where none."""
        found = np.full(len(self.order), -1, dtype=np.int64)
        found[self.candidate] = self.gt[:, area, threshold]
        return found


def match(
    truth: Truth,
    detected: Detected,
    *,
    iou_thresholds: Floats = IOU_THRESHOLDS,
    area_ranges: Floats = AREA_RANGES,
    max_dets: int = 100,
) -> Matches:
    """Match the best `max_dets` detections of each image and category to its annotations."""
    outside = (truth.area[:, None] < area_ranges[:, 0]) | (truth.area[:, None] > area_ranges[:, 1])
    ignored = truth.crowd[:, None] | outside
    order, rank = _by_category_and_score(truth, detected, max_dets)
    row, gt, iou = overlaps(truth, detected.select(order), float(iou_thresholds.min()))
    candidate, edge_of = np.unique(row, return_inverse=True)
    matched = _match_in_rounds(
        _pair(truth, detected.image[order], detected.category[order])[candidate],
        rank[candidate],
        _Edges(edge_of, gt, iou),
        ignored,
        truth.crowd,
        np.minimum(iou_thresholds, 1 - 1e-10),
    )
    return Matches(order, rank, candidate, matched, ignored)


def _pair(truth: Truth, image: Ints, category: Ints) -> Ints:
    """Return a number for each image and category."""
    return np.asarray(image * len(truth.category_ids) + category)


def _by_category_and_score(truth: Truth, detected: Detected, max_dets: int) -> tuple[Ints, Ints]:
    """Return the detections that count in COCO's order, and their rank in image and category."""
    best_first = np.argsort(-detected.score, kind="stable")
    pair = _pair(truth, detected.image, detected.category)
    order = best_first[np.argsort(pair[best_first], kind="stable")]
    ordered = pair[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    order, rank = order[rank < max_dets], rank[rank < max_dets]
    # among equal scores: by image, then as they were given
    again = np.lexsort((detected.image[order], -detected.score[order], detected.category[order]))
    return order[again], rank[again]


def overlaps(
    truth: Truth, detected: Detected, least: float, *, any_category: bool = False
) -> tuple[Ints, Ints, Floats]:
    """Return detection, annotation and IoU [E] of all that share an image and overlap so much.

    They also share the category unless `any_category`. The IoU with a crowd is the part of the
    detection inside it.
    """
    if any_category:
        gt_key, dt_key = truth.image, detected.image
    else:
        gt_key = _pair(truth, truth.image, truth.category)
        dt_key = _pair(truth, detected.image, detected.category)
    by_key = np.argsort(gt_key, kind="stable")
    first = np.searchsorted(gt_key[by_key], dt_key)
    count = np.searchsorted(gt_key[by_key], dt_key, side="right") - first
    rows = np.flatnonzero(count)
    parts = np.searchsorted(
        np.cumsum(count[rows]), np.arange(_PAIRS_AT_ONCE, count.sum(), _PAIRS_AT_ONCE)
    )
    found: list[tuple[Ints, Ints, Floats]] = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for part in np.split(rows, parts):
        row = np.repeat(part, count[part])
        within = np.arange(len(row)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
        gt = by_key[first[row] + within]
        iou = box_iou(detected.box[row], truth.box[gt], truth.crowd[gt])
        keep = iou >= min(least, 1 - 1e-10)
        found.append((row[keep], gt[keep], iou[keep]))
    row, gt, iou = (np.concatenate(column) for column in zip(*found, strict=True))
    return row, gt, iou


def box_iou(dt: Floats, gt: Floats, crowd: Bools) -> Floats:
    """Return the IoU of boxes [E,4] (x, y, w, h) one by one, by pycocotools' arithmetic."""
    width = np.minimum(dt[:, 2] + dt[:, 0], gt[:, 2] + gt[:, 0]) - np.maximum(dt[:, 0], gt[:, 0])
    height = np.minimum(dt[:, 3] + dt[:, 1], gt[:, 3] + gt[:, 1]) - np.maximum(dt[:, 1], gt[:, 1])
    shared, area = width * height, dt[:, 2] * dt[:, 3]
    union = np.where(crowd, area, area + gt[:, 2] * gt[:, 3] - shared)
    meet = (width > 0) & (height > 0)
    iou: Floats = np.divide(shared, union, out=np.zeros(len(dt)), where=meet)
    return iou


@dataclass(frozen=True)
class _Edges:
    """Overlaps [E] of candidates with annotations, by candidate."""

    candidate: Ints
    gt: Ints
    iou: Floats


def _match_in_rounds(
    pair: Ints, rank: Ints, edges: _Edges, ignored: Bools, crowd: Bools, thresholds: Floats
) -> Ints:
    """Return the annotation found by each candidate [C,A,T], -1 where none.

    Images and categories do not touch each other, so the first candidates of all choose at
    once, then the second ones, and so on.
    """
    matched = np.full((len(pair), ignored.shape[1], len(thresholds)), -1, dtype=np.int64)
    taken = np.zeros((len(ignored), ignored.shape[1], len(thresholds)), dtype=np.bool_)
    # of equal overlaps the later annotation wins, so the last edge of a candidate is its best
    best_last = np.lexsort((edges.gt, edges.iou, edges.candidate))
    edges = _Edges(edges.candidate[best_last], edges.gt[best_last], edges.iou[best_last])
    turn = np.empty(len(pair), dtype=np.int64)
    turns = np.lexsort((rank, pair))
    turn[turns] = np.arange(len(pair)) - np.searchsorted(pair[turns], pair[turns])
    edge_turn = turn[edges.candidate]
    by_turn = np.argsort(edge_turn, kind="stable")
    for edge in np.split(by_turn, np.flatnonzero(np.diff(edge_turn[by_turn])) + 1):
        if len(edge):
            _choose(edge, edges, matched, taken, ignored, crowd, thresholds)
    return matched


def _choose(
    edge: Ints,
    edges: _Edges,
    matched: Ints,
    taken: Bools,
    ignored: Bools,
    crowd: Bools,
    thresholds: Floats,
) -> None:
    """Let the candidates of some edges take their best annotation, one that counts if any."""
    gt = edges.gt[edge]
    free = ~taken[gt] | crowd[gt][:, None, None]
    free &= (edges.iou[edge][:, None] >= thresholds)[:, None]
    # key: 0 nothing; 1.. an ignored annotation; beyond all of them one that counts
    place = np.arange(1, len(edge) + 1)[:, None] + np.where(ignored[gt], 0, len(edge))
    candidate, first = np.unique(edges.candidate[edge], return_index=True)
    best = np.maximum.reduceat(np.where(free, place[:, :, None], 0), first, axis=0)
    which, area, threshold = np.nonzero(best)
    chosen = gt[(best[which, area, threshold] - 1) % len(edge)]
    matched[candidate[which], area, threshold] = chosen
    taken[chosen, area, threshold] = True


def precision_at_recalls(true: Ints, false: Ints, positives: int) -> Floats:
    """Return the precision at `RECALLS` [101], 0 where that is not reached.

    `true` and `false` [P] count the detections up to and with each that found something, by
    falling score. The precision is the best at this recall or beyond.
    """
    precision = true / (false + true + np.spacing(1))
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return np.asarray(best[np.searchsorted(true / positives, RECALLS, side="left")])


@dataclass(frozen=True)
class Accumulated:
    """Precision [T,R,K,A] and recall [T,K,A,M] as COCOeval gives them; -1: nothing to find."""

    precision: Floats
    recall: Floats


def accumulate(
    truth: Truth,
    detected: Detected,
    matches: Matches,
    *,
    area_ranges: Floats = AREA_RANGES,
    max_dets: Sequence[int] = (1, 10, 100),
) -> Accumulated:
    """Return precision with all detections that count, and recall with the best few."""
    num_areas, num_thresholds = matches.gt.shape[1:]
    categories = np.arange(len(truth.category_ids) + 1)
    precision = np.full((num_thresholds, len(RECALLS), len(categories) - 1, num_areas), -1.0)
    recall = np.full((num_thresholds, len(categories) - 1, num_areas, len(max_dets)), -1.0)
    bounds = np.searchsorted(detected.category[matches.order], categories)
    candidates = np.searchsorted(matches.candidate, bounds)
    area = detected.area[matches.order]
    rank = matches.rank[matches.candidate]
    for a, (low, high) in enumerate(area_ranges):
        positives = np.bincount(
            truth.category[~matches.ignored[:, a]], minlength=len(categories) - 1
        )
        inside = (area >= low) & (area <= high)
        for k in np.flatnonzero(positives):
            part = slice(candidates[k], candidates[k + 1])
            here = matches.candidate[part]
            inside_so_far = np.cumsum(inside[bounds[k] : bounds[k + 1]])[here - bounds[k]]
            for t in range(num_thresholds):
                gt = matches.gt[part, a, t]
                hit = (gt >= 0) & ~matches.ignored[gt, a]
                # false: of this size, and found nothing, not even what is ignored
                false = inside_so_far - np.cumsum(inside[here] & (gt >= 0))
                precision[t, :, k, a] = precision_at_recalls(
                    np.cumsum(hit)[hit], false[hit], positives[k]
                )
                recall[t, k, a] = [(rank[part][hit] < m).sum() / positives[k] for m in max_dets]
    return Accumulated(precision, recall)
