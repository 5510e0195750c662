"""The best score threshold of each class, without the rest of the analysis."""

from engine.analysis.outcomes import IOU, outcomes, thresholds
from engine.coco_evaluator import CocoEvaluator


def thresholds_by_name(evaluator: CocoEvaluator) -> dict[str, float]:
    """Return what `best_thresholds` of the analysis of the same evaluator does, in less time."""
    truth, detected = evaluator.truth, evaluator.detected()
    found = outcomes(truth, detected, (IOU,), max_dets=evaluator.max_dets)[0]
    return {
        name: best.score
        for name, best in zip(evaluator.class_names, thresholds(found), strict=True)
        if best
    }
