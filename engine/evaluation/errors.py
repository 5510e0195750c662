"""What is wrong with wrong detections, and what AP it costs.

The kinds are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020): a detection is right from an IoU of 0.5, and background below 0.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.evaluation.matching import Bools, Floats, Ints, Truth, overlaps
from engine.evaluation.outcomes import IOU, Outcomes, curve

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
    row, gt, iou = overlaps(truth, found.detections, BACKGROUND_IOU, any_category=True)
    objects = ~truth.crowd[gt] & ~found.hit[row]
    row, gt, iou = row[objects], gt[objects], iou[objects]
    same = truth.category[gt] == found.detections.category[row]
    own, own_iou = _best(row[same], gt[same], iou[same], len(found.gt))
    other, other_iou = _best(row[~same], gt[~same], iou[~same], len(found.gt))
    used = np.isin(gt, found.gt[found.hit])
    _, used_iou = _best(row[same & used], gt[same & used], iou[same & used], len(found.gt))
    tests = {
        -1: found.hit,
        _CODE["location"]: (own_iou >= BACKGROUND_IOU) & (own_iou <= IOU),
        _CODE["class"]: other_iou >= IOU,
        _CODE["duplicate"]: used_iou >= IOU,
        _CODE["background"]: np.maximum(own_iou, other_iou) <= BACKGROUND_IOU,
    }
    kind = np.select(list(tests.values()), list(tests), default=_CODE["both"])
    about = np.full(len(kind), -1)
    for name, gt_of in (("location", own), ("class", other)):
        about[kind == _CODE[name]] = gt_of[kind == _CODE[name]]
    covered = np.isin(np.arange(len(truth.crowd)), np.concatenate([found.gt, about]))
    return Errors(kind, about, ~covered & ~truth.crowd)


def _best(row: Ints, gt: Ints, iou: Floats, count: int) -> tuple[Ints, Floats]:
    """Return the annotation that each of `count` detections overlaps most, and how much."""
    best, best_iou = np.full(count, -1), np.zeros(count)
    order = np.lexsort((-gt, iou))  # the last of a row stays: the largest, of equals the first
    best[row[order]], best_iou[row[order]] = gt[order], iou[order]
    return best, best_iou


def error_kinds(
    truth: Truth, found: Outcomes, errors: Errors, above: Bools
) -> dict[str, ErrorKind]:
    """Return how often each kind occurs, how often where `above` [N], and what it costs."""
    base = mean_ap(found)
    rows = {}
    for kind in KINDS:
        if kind == "missed":
            count = above_threshold = int(errors.missed.sum())
            fewer = np.bincount(truth.category[errors.missed], minlength=len(found.positives))
            fixed = replace(found, positives=found.positives - fewer)
        else:
            of_kind = errors.kind == _CODE[kind]
            count, above_threshold = int(of_kind.sum()), int((of_kind & above).sum())
            fixed = _fixed(truth, found, errors, kind)
        # a fix can cost a little, by the steps of recall at which precision is read
        rise = max(0.0, mean_ap(fixed) - base) if found.positives.any() else None
        rows[kind] = ErrorKind(count, above_threshold, rise)
    return rows


def by_cost(errors: Mapping[str, ErrorKind]) -> list[tuple[str, ErrorKind]]:
    """Return the kinds of errors, those that cost most first."""
    return sorted(errors.items(), key=lambda item: -(item[1].delta_AP50 or 0.0))


def mean_ap(found: Outcomes) -> float:
    """Return AP50 over the categories with boxes or detections; 1, nothing wrong, without any."""
    values = []
    for (_, hit), positives in zip(found.by_category(), found.positives.tolist(), strict=True):
        if positives:
            values.append(float(curve(hit, positives).mean()))
        elif len(hit):
            values.append(0.0)
    return float(np.mean(values)) if values else 1.0


def _fixed(truth: Truth, found: Outcomes, errors: Errors, kind: str) -> Outcomes:
    """Return the outcomes with each error of a kind corrected, or its detection removed.

    An object that nothing has found goes to the best of all class and location errors about it,
    so only one of them is corrected.
    """
    wrong = np.flatnonzero(errors.about >= 0)
    gt = found.gt.copy()
    best_first = wrong[np.argsort(-found.detections.score[wrong], kind="stable")]
    about = errors.about[best_first]
    first = np.unique(about, return_index=True)[1]
    chosen = best_first[first]
    chosen = chosen[errors.kind[chosen] == _CODE[kind]]
    chosen = chosen[~np.isin(errors.about[chosen], found.gt[found.hit])]
    gt[chosen] = errors.about[chosen]
    category = found.detections.category.copy()
    category[chosen] = truth.category[gt[chosen]]
    keep = (errors.kind != _CODE[kind]) | (gt >= 0)
    kept = replace(found.detections, category=category).select(keep)
    order = np.lexsort((-kept.score, kept.category))
    return Outcomes(kept.select(order), gt[keep][order], found.positives)


def wrong_by_class(
    found: Outcomes, errors: Errors, truth: Truth, above: Bools
) -> list[Mapping[str, int]]:
    """Return for each category how many errors of each kind are `above` [N] the threshold."""
    size, wrong = len(found.positives), above & ~found.hit
    counts = np.zeros((size, len(KINDS)), dtype=np.int64)
    np.add.at(counts, (found.detections.category[wrong], errors.kind[wrong]), 1)
    counts[:, _CODE["missed"]] = np.bincount(truth.category[errors.missed], minlength=size)
    return [dict(zip(KINDS, row, strict=True)) for row in counts.tolist()]
