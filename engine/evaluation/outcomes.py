"""Which detections are right at an IoU of 0.5, best score thresholds, and what errors cost.

The kinds of errors are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", ECCV 2020): a detection is right from an IoU of 0.5, and background below 0.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.evaluation.evaluator import Evaluator
from engine.evaluation.matching import (
    AREA_RANGES,
    RECALLS,
    Bools,
    Detections,
    Floats,
    Ints,
    Truth,
    in_parts,
    match,
    overlaps,
    precision_at_recalls,
)

IOU = 0.5  # from which a detection is right
CURVE_IOUS = (0.5, 0.75, 0.9)
BACKGROUND_IOU = 0.1
KINDS = {
    "class": "on an object, but of another class",
    "location": "right class, but overlapping the object too little",
    "both": "wrong class, and overlapping too little",
    "duplicate": "on an object already found with a higher score",
    "background": "where there is no object",
    "missed": "object found by nothing, not even by a detection of the wrong class or place",
}
_CODE = {kind: code for code, kind in enumerate(KINDS)}
_CLASSIFIED_AT_ONCE = 1 << 17  # detections; each needs some 200 bytes


@dataclass(frozen=True)
class Hits:
    """Which detections are right, by category and there by falling score.

    Shape: hit [N]; count [K], how many of them are of each category; positives [K], boxes of each
    category to be found.
    """

    hit: Bools
    count: Ints
    positives: Ints

    def split(self, column: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the parts of a column [N] that belong to each category."""
        return np.split(column, np.cumsum(self.count)[:-1])


@dataclass(frozen=True)
class Outcomes:
    """Detections that count, by category and there by falling score; those on crowds left out.

    Shape: order [N], which of the detections; gt [N], the annotation found or -1; positives [K],
    boxes of each category to be found. Columns are looked up when they are asked for: there can be
    a thousand detections for each annotation.
    """

    detections: Detections
    order: Ints
    gt: Ints
    positives: Ints

    @property
    def category(self) -> Ints:
        """The category of each [N]."""
        return self.detections.category[self.order]

    @property
    def image(self) -> Ints:
        """The image of each [N]."""
        return self.detections.image[self.order]

    @property
    def score(self) -> NDArray[np.floating[Any]]:
        """The score of each [N]."""
        return self.detections.score[self.order]

    @property
    def hit(self) -> Bools:
        """Which are right [N]."""
        return np.asarray(self.gt >= 0)

    @property
    def hits(self) -> Hits:
        """Which are right, without the detections."""
        count = np.bincount(self.category, minlength=len(self.positives))
        return Hits(self.hit, count, self.positives)

    def select(self, rows: Ints | slice) -> Detections:
        """Return some of the detections."""
        return self.detections.select(self.order[rows])


def outcomes(
    truth: Truth, detections: Detections, ious: Sequence[float], *, max_dets: int
) -> tuple[Outcomes, list[Hits]]:
    """Match as COCO does, all sizes together; return the first IoU's outcomes, and all IoUs' hits.

    Categories are matched in parts.
    """
    positives = np.bincount(truth.category[~truth.crowd], minlength=len(truth.category_ids))
    counting = ~np.append(truth.crowd, False)  # the last for -1, nothing found
    orders, annotations_found = [], []
    hits: list[list[Bools]] = [[] for _ in ious]
    counts = np.zeros((len(ious), len(positives)), dtype=np.int64)
    for _, annotations, rows in in_parts(truth, detections):
        matches = match(
            truth.select(annotations),
            detections.select(rows),
            iou_thresholds=np.array(ious),
            area_ranges=AREA_RANGES[:1],
            max_dets=max_dets,
        )
        order = np.arange(len(detections))[rows][matches.order]
        for t in range(len(ious)):
            chosen = ((matches.where >> np.uint64(t)) & np.uint64(1)) > 0
            gt = np.full(len(order), -1)
            gt[matches.row[chosen]] = np.arange(len(truth.crowd))[annotations][matches.gt[chosen]]
            kept = counting[gt]
            hits[t].append(gt[kept] >= 0)
            counts[t] += np.bincount(detections.category[order[kept]], minlength=len(positives))
            if t == 0:
                orders.append(order[kept])
                annotations_found.append(gt[kept])
    found = Outcomes(
        detections, np.concatenate(orders), np.concatenate(annotations_found), positives
    )
    return found, [
        Hits(np.concatenate(parts), count, positives)
        for parts, count in zip(hits, counts, strict=True)
    ]


def curves(found: Hits) -> Floats:
    """Return the precision of each category at COCO's recalls [K,101], NaN without ground truth."""
    rows = np.full((len(found.positives), len(RECALLS)), np.nan)
    for row, hit, positives in zip(rows, found.split(found.hit), found.positives, strict=True):
        if positives:
            false = np.cumsum(~hit, dtype=np.int64)
            row[:] = precision_at_recalls(hit[:, None], false[:, None], int(positives))
    return rows


def mean_ap(found: Hits) -> float:
    """Return AP50 over the categories with boxes or detections; 1, nothing wrong, without any."""
    counted = (found.positives > 0) | (found.count > 0)
    values = np.where(found.positives > 0, curves(found).mean(axis=1), 0.0)[counted]
    return float(values.mean()) if len(values) else 1.0


@dataclass(frozen=True)
class Threshold:
    """The score from which on to keep detections, and what that reaches (0..1)."""

    score: float
    f1: float
    precision: float
    recall: float


def best_threshold(
    score: NDArray[np.floating[Any]], hit: Bools, positives: int
) -> Threshold | None:
    """Return the score with the best F1, the highest of equals; None if nothing is ever right."""
    order = np.argsort(-score, kind="stable")
    score, true = score[order], np.cumsum(hit[order])
    last_of_ties = np.flatnonzero(np.append(np.diff(score) != 0, True)[: len(score)])
    if not positives or not len(score) or not true[-1]:
        return None
    kept = last_of_ties + 1
    f1 = 2 * true[last_of_ties] / (kept + positives)
    best = int(np.argmax(f1))
    right = float(true[last_of_ties[best]])
    return Threshold(
        score=float(score[last_of_ties[best]]),
        f1=float(f1[best]),
        precision=right / float(kept[best]),
        recall=right / positives,
    )


def thresholds(found: Outcomes) -> list[Threshold | None]:
    """Return the best threshold of each category."""
    hits = found.hits
    columns = (hits.split(found.score), hits.split(hits.hit))
    return [
        best_threshold(score, hit, int(positives))
        for score, hit, positives in zip(*columns, found.positives, strict=True)
    ]


def confusion_matrix(truth: Truth, found: Outcomes, above: Bools) -> Ints:
    """Count detections `above` [N] their threshold by the class of the object they are on.

    Shape: [K+1,K+1]; rows are the true class and finally "no object", columns the detected class
    and finally "not found". Right detections take their objects first (as in AP50); the others
    then take free ones by falling overlap, 0.5 or more.
    """
    size = len(truth.category_ids)
    matrix = np.zeros((size + 1, size + 1), dtype=np.int64)
    detected = found.category
    free = ~truth.crowd
    hits = found.hit & above
    free[found.gt[hits]] = False
    np.add.at(matrix, (detected[hits], detected[hits]), 1)
    wrong = np.flatnonzero(above & ~found.hit)
    row, gt, iou = overlaps(truth, found.select(wrong), IOU, any_category=True)
    waiting = np.ones(len(wrong), dtype=np.bool_)
    for i in np.argsort(-iou, kind="stable"):
        if waiting[row[i]] and free[gt[i]]:
            waiting[row[i]] = free[gt[i]] = False
            matrix[truth.category[gt[i]], detected[wrong[row[i]]]] += 1
    matrix[size, :size] = np.bincount(detected[wrong[waiting]], minlength=size)
    matrix[:size, size] = np.bincount(truth.category[free], minlength=size)
    return matrix


def thresholds_by_name(evaluator: Evaluator) -> dict[str, float]:
    """Return the best thresholds alone, where there is one, by name; the analysis has the same."""
    truth = evaluator.truth
    found, _ = outcomes(truth, evaluator.detections(), (IOU,), max_dets=evaluator.max_dets)
    return {
        name: best.score
        for name, best in zip(truth.class_names, thresholds(found), strict=True)
        if best
    }


@dataclass(frozen=True)
class ErrorKind:
    """How often an error occurs, and by how much AP50 would rise if only it were fixed (0..1).

    That is None where there is no object to find.
    """

    count: int
    above_threshold: int
    delta_AP50: float | None  # noqa: N815, the field's name


@dataclass(frozen=True)
class Errors:
    """The kind of each wrong detection, and the annotation it is about.

    Shape: kind [N], positions in `KINDS`, -1 where right; about [N], the annotation of a class or
    location error, else -1; missed [G].
    """

    kind: Ints
    about: Ints
    missed: Bools


def classify(truth: Truth, found: Outcomes) -> Errors:
    """Return the kind of each wrong detection, and which annotations are missed."""
    used = np.zeros(len(truth.crowd), dtype=np.bool_)
    used[found.gt[found.hit]] = True
    kind, about = np.zeros(len(found.gt), np.int8), np.full(len(found.gt), -1)
    for start in range(0, len(kind), _CLASSIFIED_AT_ONCE):
        rows = slice(start, start + _CLASSIFIED_AT_ONCE)
        kind[rows], about[rows] = _kinds(truth, found.select(rows), found.hit[rows], used)
    covered = used.copy()
    covered[about[about >= 0]] = True
    return Errors(kind, about, ~covered & ~truth.crowd)


def _kinds(truth: Truth, detections: Detections, hit: Bools, used: Bools) -> tuple[Ints, Ints]:
    """Return the kind of some detections, of which some `hit` [N], and what their errors are about.

    `used` [G] says which annotations any detection has found.
    """
    row, gt, iou = overlaps(truth, detections, BACKGROUND_IOU, any_category=True)
    by_iou = np.lexsort((-gt, iou))
    by_iou = by_iou[~truth.crowd[gt[by_iou]] & ~hit[row[by_iou]]]
    row, gt, iou = row[by_iou], gt[by_iou], iou[by_iou]

    def best(among: Bools) -> tuple[Ints, Floats]:
        most, most_iou = np.full(len(hit), -1), np.zeros(len(hit))
        # the last of a row stays: the largest, of equals the first
        most[row[among]], most_iou[row[among]] = gt[among], iou[among]
        return most, most_iou

    same = truth.category[gt] == detections.category[row]
    own, own_iou = best(same)
    other, other_iou = best(~same)
    _, used_iou = best(same & used[gt])
    tests = {
        -1: hit,
        _CODE["location"]: (own_iou >= BACKGROUND_IOU) & (own_iou <= IOU),
        _CODE["class"]: other_iou >= IOU,
        _CODE["duplicate"]: used_iou >= IOU,
        _CODE["background"]: np.maximum(own_iou, other_iou) <= BACKGROUND_IOU,
    }
    kind = np.select(list(tests.values()), list(tests), default=_CODE["both"])
    about = np.select([kind == _CODE["location"], kind == _CODE["class"]], [own, other], default=-1)
    return kind, about


def error_kinds(
    truth: Truth, found: Outcomes, errors: Errors, above: Bools
) -> dict[str, ErrorKind]:
    """Return how often each kind occurs, how often where `above` [N], and what it costs."""
    in_all, seen = (
        np.bincount(errors.kind[wrong], minlength=len(KINDS))
        for wrong in (~found.hit, above & ~found.hit)
    )
    in_all[_CODE["missed"]] = seen[_CODE["missed"]] = errors.missed.sum()
    base = mean_ap(found.hits)
    # a fix can cost a little, by the steps of recall at which precision is read
    rises = [max(0.0, mean_ap(_fixed(truth, found, errors, kind)) - base) for kind in KINDS]
    return {
        kind: ErrorKind(int(in_all[k]), int(seen[k]), rises[k] if found.positives.any() else None)
        for kind, k in _CODE.items()
    }


def _fixed(truth: Truth, found: Outcomes, errors: Errors, kind: str) -> Hits:
    """Return the hits with each error of a kind corrected, or what is wrong removed.

    An object that nothing has found goes to the best of all class and location errors about it,
    so only one of them is corrected.
    """
    if kind == "missed":
        missed = np.bincount(truth.category[errors.missed], minlength=len(found.positives))
        return replace(found.hits, positives=found.positives - missed)
    gt, score = found.gt.copy(), found.score
    best_first = np.argsort(-score, kind="stable")
    best_of_each = best_first[np.unique(errors.about[best_first], return_index=True)[1]]
    about = errors.about[best_of_each]
    free = (about >= 0) & ~np.isin(about, found.gt[found.hit])
    chosen = best_of_each[free & (errors.kind[best_of_each] == _CODE[kind])]
    gt[chosen] = errors.about[chosen]
    category = found.category
    category[chosen] = truth.category[gt[chosen]]
    keep = np.flatnonzero((errors.kind != _CODE[kind]) | (gt >= 0))
    order = keep[np.lexsort((-score[keep], category[keep]))]
    count = np.bincount(category[order], minlength=len(found.positives))
    return Hits(gt[order] >= 0, count, found.positives)


def wrong_by_class(
    found: Outcomes, errors: Errors, truth: Truth, above: Bools
) -> list[dict[str, int]]:
    """Return for each category how many errors of each kind are `above` [N] the threshold."""
    size, wrong = len(found.positives), above & ~found.hit
    cell = found.category[wrong] * len(KINDS) + errors.kind[wrong]
    counts = np.bincount(cell, minlength=size * len(KINDS)).reshape(size, len(KINDS))
    counts[:, _CODE["missed"]] = np.bincount(truth.category[errors.missed], minlength=size)
    return [dict(zip(KINDS, row, strict=True)) for row in counts.tolist()]
