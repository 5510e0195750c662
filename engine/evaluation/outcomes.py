"""Which detections are right at an IoU of 0.5, precision-recall curves, best score thresholds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.evaluation.evaluator import Evaluator
from engine.evaluation.matching import (
    AREA_RANGES,
    RECALLS,
    Bools,
    Detections,
    Floats,
    Ints,
    Truth,
    match,
    overlaps,
    precision_at_recalls,
)

IOU = 0.5  # from which a detection is right
CURVE_IOUS = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Outcomes:
    """Detections that count, by category and there by falling score; those on crowds left out.

    Shape: gt [N], the annotation found or -1; positives [K], boxes of each category to be found.
    """

    detections: Detections
    gt: Ints
    positives: Ints

    @property
    def hit(self) -> Bools:
        """Which are right [N]."""
        return np.asarray(self.gt >= 0)

    def by_category(self) -> list[tuple[Floats, Bools]]:
        """Return the scores of each category's detections, and which are right."""
        starts = np.searchsorted(self.detections.category, np.arange(1, len(self.positives)))
        parts = (np.split(self.detections.score, starts), np.split(self.hit, starts))
        return list(zip(*parts, strict=True))


def outcomes(
    truth: Truth, detections: Detections, ious: Sequence[float], *, max_dets: int
) -> list[Outcomes]:
    """Match as COCO does at each IoU, all sizes together."""
    matches = match(
        truth,
        detections,
        iou_thresholds=np.array(ious),
        area_ranges=AREA_RANGES[:1],
        max_dets=max_dets,
    )
    positives = np.bincount(truth.category[~truth.crowd], minlength=len(truth.category_ids))
    crowd = np.append(truth.crowd, False)  # for -1, nothing found
    rows = []
    for t in range(len(ious)):
        found = matches.found(t)
        keep = ~crowd[found]
        rows.append(Outcomes(detections.select(matches.order[keep]), found[keep], positives))
    return rows


def curve(hit: Bools, positives: int) -> Floats:
    """Return the precision at each of COCO's 101 recalls; `hit` [n] by falling score."""
    true = np.arange(1, int(hit.sum()) + 1)
    return precision_at_recalls(true, np.flatnonzero(hit) + 1 - true, positives)


def curves(found: Outcomes) -> Floats:
    """Return the precision of each category [K,101], NaN without ground truth."""
    rows = np.full((len(found.positives), len(RECALLS)), np.nan)
    for k, (_, hit) in enumerate(found.by_category()):
        if found.positives[k]:
            rows[k] = curve(hit, int(found.positives[k]))
    return rows


@dataclass(frozen=True)
class Threshold:
    """The score from which on to keep detections, and what that reaches (0..1)."""

    score: float
    f1: float
    precision: float
    recall: float


def best_threshold(score: Floats, hit: Bools, positives: int) -> Threshold | None:
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
    return [
        best_threshold(score, hit, int(positives))
        for (score, hit), positives in zip(found.by_category(), found.positives, strict=True)
    ]


def confusion_matrix(truth: Truth, found: Outcomes, above: Bools) -> Ints:
    """Count detections `above` [N] their threshold by the class of the object they are on.

    Shape: [K+1,K+1]; rows are the true class and finally "no object", columns the detected class
    and finally "not found". Right detections take their objects first (as in AP50); the others
    then take free ones by falling overlap, 0.5 or more.
    """
    size = len(truth.category_ids)
    matrix = np.zeros((size + 1, size + 1), dtype=np.int64)
    detected = found.detections.category
    free = ~truth.crowd
    hits = found.hit & above
    free[found.gt[hits]] = False
    np.add.at(matrix, (detected[hits], detected[hits]), 1)
    wrong = np.flatnonzero(above & ~found.hit)
    row, gt, iou = overlaps(truth, found.detections.select(wrong), IOU, any_category=True)
    waiting = np.ones(len(wrong), dtype=np.bool_)
    for i in np.argsort(-iou, kind="stable"):
        if waiting[row[i]] and free[gt[i]]:
            waiting[row[i]] = free[gt[i]] = False
            matrix[truth.category[gt[i]], detected[wrong[row[i]]]] += 1
    matrix[size, :size] = np.bincount(detected[wrong[waiting]], minlength=size)
    matrix[:size, size] = np.bincount(truth.category[free], minlength=size)
    return matrix


def thresholds_by_name(evaluator: Evaluator) -> dict[str, float]:
    """Return what `best_thresholds` of the analysis of the same evaluator does, in less time."""
    truth, max_dets = evaluator.truth, evaluator.max_dets
    found = outcomes(truth, evaluator.detections(), (IOU,), max_dets=max_dets)[0]
    return {
        name: best.score
        for name, best in zip(truth.class_names, thresholds(found), strict=True)
        if best
    }
