"""Everything that is told about an evaluation beyond COCO's numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.by_image import ByCount, WorstImage, by_number_of_objects, worst_images
from engine.evaluation.errors import (
    KINDS,
    ErrorKind,
    by_cost,
    classify,
    error_kinds,
    wrong_by_class,
)
from engine.evaluation.evaluator import CocoEvaluator, EvalResult
from engine.evaluation.matching import RECALLS
from engine.evaluation.outcomes import (
    CURVE_IOUS,
    IOU,
    Threshold,
    best_threshold,
    confusion_matrix,
    curves,
    outcomes,
    thresholds,
)
from util.files import write_atomic

_WORST = 24
_NO_THRESHOLD = 0.5  # where nothing is ever right


@dataclass(frozen=True)
class ClassAnalysis:
    """A class: AP (None without ground truth), best threshold, errors above it by kind."""

    category_id: int
    name: str
    boxes: int
    AP: float | None
    AP50: float | None
    threshold: Threshold | None
    errors: Mapping[str, int]
    precision: Sequence[float] | None  # at IoU 0.5, at recalls 0, 0.01, ... 1


@dataclass(frozen=True)
class Analysis:
    """What is right and wrong about detections; AP, precision and scores in 0..1.

    `confusion` [K+1,K+1]: rows true classes and "no object", columns detected and "not found".
    `curves` has, by IoU, the precision at 101 recalls, mean over the classes.
    """

    result: EvalResult
    classes: Sequence[ClassAnalysis]
    threshold: Threshold | None  # the best for all classes together
    curves: Mapping[str, Sequence[float]]
    errors: Mapping[str, ErrorKind]
    confusion: Sequence[Sequence[int]]
    by_objects: Sequence[ByCount]
    worst: Sequence[WorstImage]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what could not be measured is null."""
        values = asdict(self)
        del values["result"]
        stats = self.result.to_json()["stats"]
        return {"stats": stats, "recalls": RECALLS.round(2).tolist(), **values}

    def summary(self) -> str:
        """Return what matters most in a few lines for a terminal."""
        costs = [(kind, e.delta_AP50) for kind, e in by_cost(self.errors)]
        lines = ["AP50 would rise, if only these errors were mended, by"]
        lines += [
            f"  {'   n/a' if cost is None else f'{cost:6.3f}'}  {kind:11}{KINDS[kind]}"
            for kind, cost in costs
        ]
        if self.threshold:
            t = self.threshold
            lines.append(
                f"best score threshold for all classes: {t.score:.3f} (precision "
                f"{t.precision:.3f}, recall {t.recall:.3f}, F1 {t.f1:.3f}); each class's is in "
                "the report"
            )
        taken = self.most_confused(3)
        if taken:
            shown = (f"{count} {true} as {other}" for true, other, count in taken)
            lines.append(f"most often confused: {', '.join(shown)}")
        return "\n".join(lines)

    def least_scores(self) -> dict[int, float]:
        """Return, by category id, the score from which a detection is above the threshold.

        Where nothing of a class is ever right, that is the best of all classes together.
        """
        least = _least_scores([c.threshold for c in self.classes], self.threshold)
        return {c.category_id: score for c, score in zip(self.classes, least, strict=True)}

    def most_confused(self, count: int) -> list[tuple[str, str, int]]:
        """Return the true class, the class detected and how often, most frequent first."""
        matrix = np.array(self.confusion)[:-1, :-1]
        np.fill_diagonal(matrix, 0)
        order = np.argsort(-matrix, axis=None, kind="stable")[:count]
        places = zip(*np.unravel_index(order, matrix.shape), strict=True)
        names = [c.name for c in self.classes]
        return [(names[i], names[j], int(matrix[i, j])) for i, j in places if matrix[i, j]]


def analyse(
    evaluator: CocoEvaluator, result: EvalResult, *, file_names: Mapping[int, str] | None = None
) -> Analysis:
    """Analyse what an evaluator was fed; `result` is what it computed, names are by image id."""
    truth, detected, max_dets = evaluator.truth, evaluator.detected(), evaluator.max_dets
    by_iou = outcomes(truth, detected, CURVE_IOUS, max_dets=max_dets)
    found = by_iou[0]
    errors = classify(truth, found)
    of_class = thresholds(found)
    overall = best_threshold(found.detected.score, found.hit, int(found.positives.sum()))
    least = np.array(_least_scores(of_class, overall))
    above = np.asarray(found.detected.score >= least[found.detected.category])
    precision = {str(iou): curves(o) for iou, o in zip(CURVE_IOUS, by_iou, strict=True)}
    return Analysis(
        result=result,
        classes=[
            ClassAnalysis(
                category_id=row.category_id,
                name=row.name,
                boxes=row.num_boxes,
                AP=_or_none(row.AP),
                AP50=_or_none(row.AP50),
                threshold=of_class[k],
                errors=wrong,
                precision=_rounded(precision[str(IOU)][k]) if row.num_boxes else None,
            )
            for k, (row, wrong) in enumerate(
                zip(result.per_class, wrong_by_class(found, errors, truth, above), strict=True)
            )
        ],
        threshold=overall,
        curves={
            iou: _rounded(rows[found.positives > 0].mean(axis=0))
            for iou, rows in precision.items()
            if found.positives.any()
        },
        errors=error_kinds(truth, found, errors, above),
        confusion=confusion_matrix(truth, found, above).tolist(),
        by_objects=by_number_of_objects(truth, detected, max_dets=max_dets),
        worst=worst_images(truth, found, above, file_names or {}, _WORST),
    )


def best_thresholds(analysis: Analysis) -> dict[str, float]:
    """Return, by class name, the score from which detections are best kept.

    It has the best F1 at an IoU of 0.5. A class of which nothing was ever right is left out.
    """
    return {c.name: c.threshold.score for c in analysis.classes if c.threshold}


def save_analysis(output_dir: Path, analysis: Analysis) -> None:
    """Write `eval/analysis.json`."""
    content = {"best_thresholds": best_thresholds(analysis), **analysis.to_json()}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file = output_dir / "eval" / "analysis.json"
    write_atomic(file, text + "\n", errors="backslashreplace")


def _least_scores(of_class: Sequence[Threshold | None], overall: Threshold | None) -> list[float]:
    common = overall.score if overall else _NO_THRESHOLD
    return [t.score if t else common for t in of_class]


def _or_none(value: float) -> float | None:
    return None if value < 0 else value


def _rounded(values: "np.ndarray[Any, np.dtype[np.float64]]") -> list[float]:
    return [round(float(v), 4) for v in values]
