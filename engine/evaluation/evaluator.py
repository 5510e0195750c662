"""COCO box metrics: collect detections, evaluate them, write the results."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.evaluation.matching import AREA_RANGES, Detections, Floats, Truth, accumulate
from util.console import in_line
from util.files import atomic_path, write_atomic

Backend = Literal["fast", "pycocotools"]

STAT_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
_TABLE_ROWS = (
    ("AP", ("AP", "AP_small", "AP_medium", "AP_large")),
    ("AP50", ("AP50",)),
    ("AP75", ("AP75",)),
    ("AR@1", ("AR_1",)),
    ("AR@10", ("AR_10",)),
    ("AR@100", ("AR_100", "AR_small", "AR_medium", "AR_large")),
)
_WRITTEN_AT_ONCE = 100_000  # detections
_MAX_CLASSES_SHOWN = 100
_MAX_NAME_LENGTH = 24


@dataclass(frozen=True)
class ClassResult:
    """AP of one category; -1 where it has no ground truth. Crowds are not in `num_boxes`."""

    category_id: int | str
    name: str
    AP: float
    AP50: float
    num_boxes: int


@dataclass(frozen=True)
class EvalResult:
    """The 12 COCO numbers by name, in pycocotools' order, and the AP of each class.

    Range: 0..1, or -1 where no ground truth exists to measure on. `beyond_100` has `max_dets`, the
    detections of an image and class that count, AP, AP50, AP75 and AR, where those are more than
    COCO's 100. `area_bounds` are the areas (square pixels) from which an object is medium and
    large, where those are not COCO's.
    """

    stats: dict[str, float]
    per_class: list[ClassResult]
    num_images: int
    num_detections: int
    beyond_100: dict[str, float] | None = None
    area_bounds: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a result file; None where there is nothing to measure on."""
        values = asdict(self)
        for numbers in (values["stats"], *values["per_class"], values["beyond_100"] or {}):
            numbers |= {k: None for k, v in numbers.items() if isinstance(v, float) and v < 0}
        if self.area_bounds is None:
            del values["area_bounds"]
        return values

    def table(self) -> str:
        """Return the numbers as aligned text for a terminal."""
        lines = [
            f"{self.num_images} images, {sum(c.num_boxes for c in self.per_class)} ground-truth "
            f"boxes, {self.num_detections} detections",
            f"{'':7}{'all':>8}{'small':>8}{'medium':>8}{'large':>8}",
        ]
        lines += [
            f"{title:7}" + "".join(f"{_shown(self.stats[n]):>8}" for n in names)
            for title, names in _TABLE_ROWS
        ]
        if self.area_bounds:
            medium, large = self.area_bounds
            lines.append(
                f"notice: medium is from {medium:g} to {large:g} square pixels, which is not COCO's"
            )
        if self.stats["AP"] < 0:
            lines.append("n/a: no ground truth")
        else:
            sizes = [s for s in ("small", "medium", "large") if self.stats[f"AP_{s}"] < 0]
            lines += [f"n/a: no {' or '.join(sizes)} ground truth"] if sizes else []
        if self.beyond_100:
            shown = ", ".join(f"{k} {_shown(v)}" for k, v in self.beyond_100.items() if k[0] == "A")
            lines.append(
                "notice: the numbers above count 100 detections per image and class; with "
                f"{self.beyond_100['max_dets']:.0f}: {shown}"
            )
        return "\n".join([*lines, "", *_class_lines(self.per_class)])


def comparison_table(results: Mapping[str, EvalResult]) -> str:
    """Return the numbers of several models as aligned text, in their order."""
    width = max(map(len, ["checkpoint", *results]))
    shown = [*STAT_NAMES[:6], "AR_100"]
    lines = [f"{'checkpoint':{width}}" + "".join(f"{name:>11}" for name in shown)]
    lines += [
        f"{name:{width}}" + "".join(f"{_shown(result.stats[n]):>11}" for n in shown)
        for name, result in results.items()
    ]
    return "\n".join(lines)


def _shown(value: float) -> str:
    return "n/a" if value < 0 else f"{value:.3f}"


def _class_lines(per_class: Sequence[ClassResult]) -> list[str]:
    """Return a table of the classes, in two blocks side by side when there are many."""
    if len(per_class) > _MAX_CLASSES_SHOWN:
        return [f"{len(per_class)} classes: too many to show, all are in the result file"]
    names = [
        name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"
        for name in (in_line(c.name) for c in per_class)
    ]
    width = max(map(len, ["class", *names]))
    header = f"{'class':{width}}{'boxes':>8}{'AP':>8}{'AP50':>8}"
    rows = [
        f"{name:{width}}{c.num_boxes:>8}{_shown(c.AP):>8}{_shown(c.AP50):>8}"
        for name, c in zip(names, per_class, strict=True)
    ]
    if len(rows) <= 20:
        return [header, *rows]
    half = (len(rows) + 1) // 2
    pairs = zip_longest([header, *rows[:half]], [header, *rows[half:]], fillvalue="")
    return ["    ".join(pair).rstrip() for pair in pairs]


class Evaluator:
    """Collect detections, then compare them with all images of a data set.

    The numbers are those of plain pycocotools, except that a ground-truth annotation of id 0
    counts like any other (pycocotools reads it as "no match").

    `label_to_category` maps the model's labels to category ids; without it, labels are category
    ids. `backend`: "fast" is ours and gives the same numbers to the last digit. `max_dets`:
    detections of an image and class that count in `EvalResult.beyond_100`, where they are more than
    COCO's 100; 0 means as many as an image has boxes of a class. `area_bounds`: the areas in square
    pixels from which an object is medium and large, if not COCO's.
    """

    def __init__(
        self,
        truth: Truth,
        label_to_category: Mapping[int, int] | None = None,
        *,
        backend: Backend = "fast",
        max_dets: int = 0,
        area_bounds: tuple[float, float] | None = None,
    ) -> None:
        self.truth = truth
        self.area_bounds = area_bounds
        category = {c: k for k, c in enumerate(truth.category_ids.tolist())}
        labels = {c: c for c in category} if label_to_category is None else label_to_category
        self._category_of = {label: category[c] for label, c in labels.items() if c in category}
        self._image_of = {i: position for position, i in enumerate(truth.image_ids.tolist())}
        self._backend, self._asked_dets = backend, max_dets
        # a class's boxes in an image, at most; crowds do not count
        pair = (truth.image * len(category) + truth.category)[~truth.crowd]
        most = np.unique(pair, return_counts=True)[1].max(initial=0)
        self.max_dets = max(100, max_dets or int(most))
        self._parts: list[_OfImage | Detections] = []
        self._part_of = np.full(len(truth.image_ids), -1)  # which of them counts for an image

    def update(self, image_ids: Sequence[int], outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Add what a model found in some images; an image added again replaces its earlier results.

        Labels without a category in the data set are dropped: the official 91-logit head has
        unused ones.

        Shape: `scores` [K], `labels` [K] int64, `boxes` [K,4] xyxy in pixels of the original image.

        Raises:
            ValueError: an image is not in the data set, or a number is not finite.
        """
        for image_id, output in zip(image_ids, outputs, strict=True):
            if image_id not in self._image_of:
                raise ValueError(f"image id {image_id} is not in the data set")
            scores, boxes = output["scores"].cpu(), output["boxes"].cpu()
            if not (torch.isfinite(scores).all() and torch.isfinite(boxes).all()):
                raise ValueError(f"image id {image_id}: a score or a box is not finite")
            category = np.array(
                [self._category_of.get(label, -1) for label in output["labels"].tolist()],
                dtype=np.int32,
            )
            known = category >= 0
            position = self._image_of[image_id]
            part = _OfImage(position, category[known], _exact(boxes)[known], _exact(scores)[known])
            before = self._part_of[position]
            if before >= 0 and isinstance(self._parts[before], _OfImage):
                self._parts[before] = part
            else:
                self._part_of[position] = len(self._parts)
                self._parts.append(part)

    def add(self, detections: Detections) -> None:
        """Add those of another evaluator of the data set, or from a file, as `update` does."""
        self._part_of[detections.image] = len(self._parts)
        self._parts.append(detections)

    def detections(self) -> Detections:
        """Return everything added so far, by ascending image id; not to be written to."""
        blocks, images = [], []
        for number, part in enumerate(self._parts):
            if isinstance(part, Detections):
                counting = self._part_of[part.image] == number
                blocks.append(part if counting.all() else part.select(counting))
            elif self._part_of[part.image] == number:
                images.append(part)
        self._parts = []
        if images or not blocks:
            blocks.append(_join(images))
        found = blocks[0] if len(blocks) == 1 else Detections.concatenate(blocks)
        if (np.diff(found.image) < 0).any():
            found = found.select(np.argsort(found.image, kind="stable"))
        self._parts = [found]
        self._part_of[:] = -1
        self._part_of[found.image] = 0
        return found

    def evaluate(self) -> EvalResult:
        """Compute the metrics over all images; one never added counts as missed."""
        detections = self.detections()
        backend = _accumulate_pycocotools if self._backend == "pycocotools" else accumulate
        compute = partial(
            backend, self.truth, detections, area_ranges=area_ranges(self.area_bounds)
        )
        (precision, recall), beyond = compute(max_dets=100), None
        if self.max_dets > 100:
            more_precision, more_recall = compute(max_dets=self.max_dets)
            beyond = {
                "max_dets": float(self.max_dets),
                **_summary(more_precision),
                "AR": mean_of_valid(more_recall[:, :, 0, -1]),
            }
        truth, sizes = self.truth, range(1, 4)
        stats = [
            *_summary(precision).values(),
            *(mean_of_valid(precision[..., a]) for a in sizes),
            *(mean_of_valid(recall[:, :, 0, m]) for m in range(3)),
            *(mean_of_valid(recall[:, :, a, 2]) for a in sizes),
        ]
        boxes = np.bincount(truth.category[~truth.crowd], minlength=len(truth.category_ids))
        return EvalResult(
            stats=dict(zip(STAT_NAMES, stats, strict=True)),
            per_class=[
                ClassResult(
                    category_id=truth.category_texts.get(category_id, category_id),
                    name=name,
                    AP=mean_of_valid(precision[:, :, k, 0]),
                    AP50=mean_of_valid(precision[0, :, k, 0]),
                    num_boxes=int(boxes[k]),
                )
                for k, (category_id, name) in enumerate(
                    zip(truth.category_ids.tolist(), truth.class_names, strict=True)
                )
            ],
            num_images=len(truth.image_ids),
            num_detections=len(detections),
            beyond_100=beyond,
            area_bounds=self.area_bounds,
        )

    def without_classes(self) -> "Evaluator":
        """Return an evaluator of the same boxes, in which all are of one class."""
        truth, found = self.truth, self.detections()
        merged = Evaluator(
            replace(
                truth,
                category_ids=np.ones(1, dtype=np.int64),
                class_names=("object",),
                category=np.zeros_like(truth.category),
                category_texts={},
            ),
            backend=self._backend,
            max_dets=self._asked_dets,
            area_bounds=self.area_bounds,
        )
        merged.add(replace(found, category=np.zeros_like(found.category)))
        return merged


@dataclass(frozen=True, eq=False, slots=True)
class _OfImage:
    """What was found in an image, by its position, in the fewest bytes that hold every bit.

    Shape: category [K] int32; corners [K,4] xyxy and score [K], float32 where that is what came.
    """

    image: int
    category: NDArray[np.int32]
    corners: NDArray[np.floating[Any]]
    score: NDArray[np.floating[Any]]


def _exact(values: Tensor) -> NDArray[np.floating[Any]]:
    """Return the same numbers in NumPy, which has no bfloat16."""
    exact = values if values.dtype == torch.float32 else values.double()
    return exact.numpy()


def _join(images: list[_OfImage]) -> Detections:
    """Return what was found in some images, by ascending id.

    The list is emptied one by one: memory never holds everything twice.
    """
    images.sort(key=lambda part: part.image, reverse=True)
    count = sum(len(part.score) for part in images)
    joined = Detections(
        image=np.empty(count, dtype=np.int32),
        category=np.empty(count, dtype=np.int32),
        # float64 holds every float32 exactly, so the written numbers lose nothing
        box=np.empty((count, 4)),
        score=np.empty(
            count, dtype=np.result_type(np.float32, *{part.score.dtype for part in images})
        ),
    )
    start = 0
    while images:
        part = images.pop()
        rows = slice(start, start + len(part.score))
        joined.image[rows], joined.category[rows] = part.image, part.category
        joined.box[rows], joined.score[rows] = part.corners, part.score
        start = rows.stop
    joined.box[:, 2:] -= joined.box[:, :2]
    return joined


def area_ranges(bounds: tuple[float, float] | None) -> Floats:
    """Return the minimum and maximum area of all, small, medium and large objects [4,2]."""
    if bounds is None:
        return AREA_RANGES
    ranges = AREA_RANGES.copy()
    medium, large = bounds
    ranges[1, 1], ranges[2], ranges[3, 0] = medium, bounds, large
    return ranges


def _accumulate_pycocotools(
    truth: Truth, detections: Detections, *, area_ranges: Floats, max_dets: int
) -> tuple[Floats, Floats]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in truth.image_ids.tolist()],
            "categories": [{"id": c} for c in truth.category_ids.tolist()],
            # pycocotools reads id 0 as "no match"
            "annotations": [{**a, "id": i} for i, a in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        return coco

    annotations = [
        {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
        for image, category, box, area, crowd in zip(
            truth.image_ids[truth.image].tolist(),
            truth.category_ids[truth.category].tolist(),
            truth.box.tolist(),
            truth.area.tolist(),
            truth.crowd.astype(int).tolist(),
            strict=True,
        )
    ]
    numbers = replace(truth, image_texts={}, category_texts={})
    results = [{**d, "area": d["bbox"][2] * d["bbox"][3]} for d in detections.to_coco(numbers)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(indexed(annotations), indexed(results), "bbox")
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.params.areaRng = area_ranges.tolist()
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., -1], evaluation.eval["recall"]


def _summary(precision: Floats) -> dict[str, float]:
    """Return AP over all thresholds, at 0.5 and at 0.75."""
    return {
        "AP": mean_of_valid(precision[..., 0]),
        "AP50": mean_of_valid(precision[0, ..., 0]),
        "AP75": mean_of_valid(precision[5, ..., 0]),
    }


def mean_of_valid(values: Floats) -> float:
    """Return the mean of what could be measured; -1 if nothing could."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def save_results(output_dir: Path, result: EvalResult, evaluator: Evaluator | None) -> None:
    """Write `eval/results.json` and, of an evaluator, `eval/detections.json` (COCO results)."""
    numbers = json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_atomic(output_dir / "eval/results.json", numbers, errors="backslashreplace")
    if evaluator is None:
        return
    found, truth = evaluator.detections(), evaluator.truth
    with (
        atomic_path(output_dir / "eval/detections.json") as part,
        part.open("w", encoding="ascii", newline="\n") as file,
    ):
        file.write("[")
        # entries in Python take twenty times the memory of the arrays
        for start in range(0, len(found), _WRITTEN_AT_ONCE):
            entries = found.select(slice(start, start + _WRITTEN_AT_ONCE)).to_coco(truth)
            file.write(", " if start else "")
            file.write(json.dumps(entries, allow_nan=False)[1:-1])
        file.write("]\n")
