"""Everything reported about an evaluation beyond COCO's numbers: errors, a page, images."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.evaluation.evaluator import EvalResult, Evaluator, mean_of_valid
from engine.evaluation.matching import (
    AREA_RANGES,
    RECALLS,
    Bools,
    Detections,
    Floats,
    Truth,
    accumulate,
)
from engine.evaluation.outcomes import (
    CURVE_IOUS,
    IOU,
    KINDS,
    ErrorKind,
    Outcomes,
    Threshold,
    best_threshold,
    classify,
    confusion_matrix,
    curves,
    error_kinds,
    outcomes,
    thresholds,
    wrong_by_class,
)
from util.console import short_name
from util.draw import draw_boxes, side_by_side
from util.files import write_atomic
from util.html import inline_image, render, svg
from util.plot import curve_chart

ReadImage = Callable[[int], Image.Image | None]  # by image id; None if it cannot be read

_OBJECTS = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, None))
_WORST_IMAGES = 24
_NO_THRESHOLD = 0.5  # where nothing is ever right


@dataclass(frozen=True)
class ClassAnalysis:
    """A class: AP (None without ground truth), best threshold, errors above it by kind."""

    category_id: int | str
    name: str
    boxes: int
    AP: float | None
    AP50: float | None
    threshold: Threshold | None
    errors: Mapping[str, int]
    precision: Sequence[float] | None  # at IoU 0.5, at recalls 0, 0.01, ... 1


@dataclass(frozen=True)
class ByCount:
    """AP (0..1, None without ground truth) over the images with a number of objects."""

    objects: str
    images: int
    AP: float | None
    AP50: float | None


@dataclass(frozen=True)
class ImageNumbers:
    """What is right and wrong in an image, at each class's best threshold.

    `found` and `missed` are its objects, `false_alarms` the other detections. `lost` is in scores:
    an object loses 1 minus the score it was found with, whatever that is; a false alarm above the
    threshold loses its score.
    """

    image_id: int
    file_name: str
    lost: float
    objects: int
    found: int
    missed: int
    false_alarms: int


@dataclass(frozen=True)
class Analysis:
    """What is right and wrong about detections; AP, precision and scores in 0..1.

    `confusion` [K+1,K+1]: rows true classes and "no object", columns detected and "not found".
    `curves` has, by IoU, the precision at 101 recalls, mean over the classes. `min_scores` [K]:
    from which on each class's detections are above the threshold; where nothing of a class is ever
    right, that is the best of all classes together.
    """

    result: EvalResult
    classes: Sequence[ClassAnalysis]
    min_scores: Floats
    threshold: Threshold | None  # the best for all classes together
    curves: Mapping[str, Sequence[float]]
    errors: Mapping[str, ErrorKind]
    confusion: Sequence[Sequence[int]]
    by_objects: Sequence[ByCount]
    images: Sequence[ImageNumbers]
    image_texts: Mapping[int, str]  # ids that the data has as text

    @property
    def worst(self) -> list[ImageNumbers]:
        """Return the images that lose the most score, worst first."""
        losing = sorted((i for i in self.images if i.lost > 0), key=lambda image: -image.lost)
        return losing[:_WORST_IMAGES]

    def rows(self, images: Iterable[ImageNumbers]) -> list[dict[str, Any]]:
        """Return plain values, with the ids that the data has."""
        texts = self.image_texts
        return [{**vars(i), "image_id": texts.get(i.image_id, i.image_id)} for i in images]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what could not be measured is null; of images, the worst."""
        values = asdict(replace(self, images=()))
        del values["result"], values["min_scores"], values["images"], values["image_texts"]
        values["worst"] = self.rows(self.worst)
        return {
            "best_thresholds": {c.name: c.threshold.score for c in self.classes if c.threshold},
            "stats": self.result.to_json()["stats"],
            "recalls": RECALLS.round(2).tolist(),
            **values,
        }

    def by_cost(self) -> list[tuple[str, ErrorKind]]:
        """Return the kinds of errors, those that cost most first."""
        return sorted(self.errors.items(), key=lambda item: -(item[1].delta_AP50 or 0.0))

    def summary(self) -> str:
        """Return what matters most in a few lines for a terminal."""
        lines = ["AP50 gained by fixing only one kind of error:"]
        for kind, error in self.by_cost():
            gain = "   n/a" if error.delta_AP50 is None else f"{error.delta_AP50:6.3f}"
            lines.append(f"  {gain}  {kind:11}{KINDS[kind]}")
        if t := self.threshold:
            lines.append(
                f"best score threshold for all classes: {t.score:.3f} (precision "
                f"{t.precision:.3f}, recall {t.recall:.3f}, F1 {t.f1:.3f}); the report has each "
                "class's"
            )
        confused = [f"{count} {true} as {other}" for true, other, count in self.most_confused(3)]
        lines += [f"most often confused: {', '.join(confused)}"] if confused else []
        return "\n".join(lines)

    def most_confused(self, count: int) -> list[tuple[str, str, int]]:
        """Return the true class, the class detected and how often, most frequent first."""
        matrix = np.array(self.confusion)[:-1, :-1]
        np.fill_diagonal(matrix, 0)
        order = np.argsort(-matrix, axis=None, kind="stable")[:count]
        cells = zip(*np.unravel_index(order, matrix.shape), strict=True)
        names = [short_name(c.name) for c in self.classes]
        return [(names[i], names[j], int(matrix[i, j])) for i, j in cells if matrix[i, j]]


def analyse(evaluator: Evaluator, result: EvalResult) -> Analysis:
    """Analyse what was added to an evaluator; `result` is what it computed."""
    truth, detections, max_dets = evaluator.truth, evaluator.detections(), evaluator.max_dets
    found, by_iou = outcomes(truth, detections, CURVE_IOUS, max_dets=max_dets)
    errors = classify(truth, found)
    of_class = thresholds(found)
    overall = best_threshold(found.score, found.hit, int(found.positives.sum()))
    common = overall.score if overall else _NO_THRESHOLD
    min_scores = np.array([t.score if t else common for t in of_class])
    above = np.asarray(found.score >= min_scores[found.category])
    precision = {str(iou): curves(hits) for iou, hits in zip(CURVE_IOUS, by_iou, strict=True)}
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
        min_scores=min_scores,
        threshold=overall,
        curves={
            iou: _rounded(rows[found.positives > 0].mean(axis=0))
            for iou, rows in precision.items()
            if found.positives.any()
        },
        errors=error_kinds(truth, found, errors, above),
        confusion=confusion_matrix(truth, found, above).tolist(),
        by_objects=_by_number_of_objects(truth, detections, max_dets),
        images=_images(truth, found, above),
        image_texts=truth.image_texts,
    )


def save_analysis(
    output_dir: Path, analysis: Analysis, images: Mapping[int, Image.Image], *, title: str
) -> None:
    """Write `analysis.json`, `images.json` and `report.html` to `eval/`; see `report`."""
    text = json.dumps(analysis.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    rows = (
        json.dumps(row, ensure_ascii=False, allow_nan=False)
        for row in analysis.rows(analysis.images)
    )
    contents = {
        "analysis.json": f"{text}\n",
        "images.json": "[\n{}\n]\n".format(",\n".join(rows)),
        "report.html": report(analysis, images, title=title),
    }
    for name, content in contents.items():
        write_atomic(output_dir / "eval" / name, content, errors="backslashreplace")


def report(analysis: Analysis, images: Mapping[int, Image.Image], *, title: str) -> str:
    """Return a page that needs nothing else; `images`, by image id, are shown with the worst."""
    lines = {f"IoU {iou}": values for iou, values in analysis.curves.items()}
    mean_ap = ", ".join(f"{np.mean(values):.3f} at {name}" for name, values in lines.items())
    return render(
        Path(__file__).with_name("report.html.j2"),
        title=f"Evaluation: {title}",
        analysis=analysis,
        result=analysis.result.to_json(),
        errors=analysis.by_cost(),
        kinds=KINDS,
        mean_ap=mean_ap,
        chart=svg(curve_chart(lines), f"Precision over recall: AP {mean_ap}") if lines else None,
        images={image_id: inline_image(image) for image_id, image in images.items()},
    )


def _by_number_of_objects(truth: Truth, detections: Detections, max_dets: int) -> list[ByCount]:
    """Return AP over images with 1, 2-3, 4-7, ... objects; crowds do not count."""
    objects = np.bincount(truth.image[~truth.crowd], minlength=len(truth.image_ids))
    rows = []
    for low, high in _OBJECTS:
        chosen = (objects >= low) & (objects <= (high or objects.max(initial=0)))
        if chosen.any():
            precision, _ = accumulate(
                truth.select(chosen[truth.image]),
                detections.select(chosen[detections.image]),
                area_ranges=AREA_RANGES[:1],
                max_dets=max_dets,
            )
            AP, AP50 = (_or_none(mean_of_valid(values)) for values in (precision, precision[0]))
            name = str(low) if low == high else f"{low}-{high}" if high else f"{low} or more"
            rows.append(ByCount(name, int(chosen.sum()), AP, AP50))
    return rows


def _images(truth: Truth, found: Outcomes, above: Bools) -> list[ImageNumbers]:
    """Return the numbers of every image, by ascending id."""
    images = len(truth.image_ids)
    image, score, hit = found.image, found.score, found.hit
    won = np.bincount(image[hit], weights=np.minimum(score[hit], 1.0), minlength=images)
    alarm = above & ~hit
    lost_to_alarms = np.bincount(image[alarm], weights=score[alarm], minlength=images)
    objects = np.bincount(truth.image[~truth.crowd], minlength=images)
    right = np.bincount(image[hit & above], minlength=images)
    alarms = np.bincount(image[alarm], minlength=images)
    lost = objects - won + lost_to_alarms
    columns = (truth.image_ids, lost, objects, right, objects - right, alarms)
    return [
        ImageNumbers(image_id, name, *numbers)
        for name, (image_id, *numbers) in zip(
            truth.file_names, zip(*(c.tolist() for c in columns), strict=True), strict=True
        )
    ]


def _or_none(value: float) -> float | None:
    return None if value < 0 else value


def _rounded(values: Floats) -> list[float]:
    return [round(float(v), 4) for v in values]


def evenly_spaced(ids: Sequence[int], count: int) -> list[int]:
    """Return `count` ids spread over the whole list, the same ones every time."""
    count = min(count, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


def draw_gallery(
    detections: Detections,
    truth: Truth,
    image_ids: Sequence[int],
    read_image: ReadImage,
    *,
    score_threshold: float | None = 0.3,
) -> dict[int, Image.Image]:
    """Draw, by image id, the detections from a score on beside the ground truth.

    None for the threshold draws all of them. An image that cannot be read is left out.
    """
    title = "predictions"
    if score_threshold is not None:
        detections = detections.select(detections.score >= score_threshold)
        title += f", score >= {score_threshold}"
    drawn = {}
    for image_id in image_ids:
        image = read_image(image_id)
        if image is None:
            continue
        position = int(np.searchsorted(truth.image_ids, image_id))
        left, right = (
            _draw(image, boxes.select(boxes.image == position), truth.class_names)
            for boxes in (detections, truth)
        )
        drawn[image_id] = side_by_side(left, right, (title, "ground truth"))
    return drawn


def _draw(image: Image.Image, boxes: Detections | Truth, class_names: Sequence[str]) -> Image.Image:
    corners = torch.from_numpy(np.hstack([boxes.box[:, :2], boxes.box[:, :2] + boxes.box[:, 2:]]))
    labels = boxes.category.tolist()
    scores = boxes.score.tolist() if isinstance(boxes, Detections) else None
    return draw_boxes(image, corners, labels, [class_names[label] for label in labels], scores)
