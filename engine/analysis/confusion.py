"""Which classes are taken for which."""

import numpy as np

from engine.analysis.outcomes import IOU, Outcomes
from engine.coco_matching import Bools, Ints, Truth, overlaps


def confusion_matrix(truth: Truth, found: Outcomes, above: Bools) -> Ints:
    """Count detections `above` [N] their threshold by the class of the object they are on.

    Shape: [K+1,K+1]; rows are the true class and last "no object", columns the class detected and
    last "not found". Right detections take their objects first (as in AP50); the others then take
    free ones by falling overlap, at least 0.5.
    """
    size = len(truth.category_ids)
    matrix = np.zeros((size + 1, size + 1), dtype=np.int64)
    detected = found.detected
    free = ~truth.crowd
    hits = found.hit & above
    free[found.gt[hits]] = False
    np.add.at(matrix, (detected.category[hits], detected.category[hits]), 1)
    wrong = np.flatnonzero(above & ~found.hit)
    row, gt, iou = overlaps(truth, detected.select(wrong), IOU, any_category=True)
    waiting = np.ones(len(wrong), dtype=np.bool_)
    for i in np.argsort(-iou, kind="stable"):
        if waiting[row[i]] and free[gt[i]]:
            waiting[row[i]] = free[gt[i]] = False
            matrix[truth.category[gt[i]], detected.category[wrong[row[i]]]] += 1
    matrix[size, :size] = np.bincount(detected.category[wrong[waiting]], minlength=size)
    matrix[:size, size] = np.bincount(truth.category[free], minlength=size)
    return matrix
