"""COCO box metrics: collect detections, evaluate them, write the results."""

import contextlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from engine.evaluation.matching import Accumulated, Detected, Truth, accumulate, match
from util.files import write_atomic

Backend = Literal["fast", "pycocotools"]
Detection = dict[str, Tensor]
"""`scores` [K], `labels` [K] int64, `boxes` [K,4] xyxy in pixels of the original image."""

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
_MOST_CLASSES_SHOWN = 100
_LONGEST_NAME = 24


@dataclass(frozen=True)
class ClassResult:
    """AP of one category; -1 where it has no ground truth. Crowds are not in `num_boxes`."""

    category_id: int
    name: str
    AP: float
    AP50: float
    num_boxes: int


@dataclass(frozen=True)
class EvalResult:
    """The 12 COCO numbers by name, in pycocotools' order, and the AP of each class.

    Range: 0..1, or -1 where no ground truth exists to measure on. `beyond_100` has `max_dets`, the
    detections of an image and class that count, AP, AP50, AP75 and AR, where those are more than
    COCO's 100.
    """

    stats: dict[str, float]
    per_class: list[ClassResult]
    num_images: int
    num_detections: int
    beyond_100: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a result file; None where there is nothing to measure on."""
        values = asdict(self)
        for numbers in (values["stats"], *values["per_class"], values["beyond_100"] or {}):
            numbers |= {k: None for k, v in numbers.items() if isinstance(v, float) and v < 0}
        return values

    def table(self) -> str:
        """Return the numbers as aligned text for a terminal."""
        boxes = sum(c.num_boxes for c in self.per_class)
        lines = [
            f"{self.num_images} images, {boxes} ground-truth boxes, "
            f"{self.num_detections} detections",
            f"{'':7}{'all':>8}{'small':>8}{'medium':>8}{'large':>8}",
        ]
        for title, names in _TABLE_ROWS:
            lines.append(f"{title:7}" + "".join(f"{_shown(self.stats[n]):>8}" for n in names))
        if self.stats["AP"] < 0:
            lines.append("n/a: no ground truth")
        else:
            sizes = [s for s in ("small", "medium", "large") if self.stats[f"AP_{s}"] < 0]
            lines += [f"n/a: no {' or '.join(sizes)} ground truth"] if sizes else []
        if self.beyond_100:
            shown = ", ".join(f"{k} {_shown(v)}" for k, v in self.beyond_100.items() if k[0] == "A")
            lines.append(
                "notice: above, 100 detections of an image and class count; with "
                f"{self.beyond_100['max_dets']:.0f}: {shown}"
            )
        return "\n".join([*lines, "", *_class_lines(self.per_class)])


def _shown(value: float) -> str:
    return "n/a" if value < 0 else f"{value:.3f}"


def _class_lines(per_class: Sequence[ClassResult]) -> list[str]:
    """Return a table of the classes, in two blocks side by side when there are many."""
    if len(per_class) > _MOST_CLASSES_SHOWN:
        return [f"{len(per_class)} classes: too many to show, all are in the result file"]
    most = _LONGEST_NAME
    names = [c.name if len(c.name) <= most else c.name[: most - 1] + "…" for c in per_class]
    width = max(map(len, ["class", *names]))
    header = f"{'class':{width}}{'boxes':>8}{'AP':>8}{'AP50':>8}"
    rows = [
        f"{name:{width}}{c.num_boxes:>8}{_shown(c.AP):>8}{_shown(c.AP50):>8}"
        for name, c in zip(names, per_class, strict=True)
    ]
    if len(rows) <= 20:
        return [header, *rows]
    half = (len(rows) + 1) // 2
    left, right = [header, *rows[:half]], [header, *rows[half:]]
    right += [""] * (len(left) - len(right))
    return [f"{a}    {b}".rstrip() for a, b in zip(left, right, strict=True)]


@dataclass(frozen=True)
class Found:
    """Detections in columns: `images` are those fed, the others have one entry a detection."""

    images: NDArray[np.int64]
    image: NDArray[np.int64]
    category: NDArray[np.int64]
    box: NDArray[np.float64]  # [K,4] xywh
    score: NDArray[np.float64]


class CocoEvaluator:
    """Collect detections, then compare them with all images of a data set.

    The numbers are those of plain pycocotools, except that a ground-truth annotation of id 0
    counts as any other (pycocotools takes it for unmatched) and that missing `area` and
    `iscrowd` are filled in. Unusable boxes are no part of the ground truth that data sets give.

    `backend`: "fast" is ours and gives the same numbers to the last digit. `max_dets`: detections
    of an image and class that count in `EvalResult.beyond_100`; 0 means as many as an image has
    boxes of a class.
    """

    def __init__(
        self,
        coco_gt: COCO,
        label_to_category: Mapping[int, int],
        *,
        backend: Backend = "fast",
        max_dets: int = 0,
    ) -> None:
        categories = set(coco_gt.getCatIds())
        self._category_of = {k: c for k, c in label_to_category.items() if c in categories}
        self._ground_truth = _numbered_copy(coco_gt)
        self._backend = backend
        self._max_dets = max_dets or _most_boxes(self.truth)
        self._by_image: dict[int, _Columns] = {}

    @cached_property
    def truth(self) -> Truth:
        """The ground truth in columns."""
        return _truth(self._ground_truth)

    @property
    def max_dets(self) -> int:
        """How many detections of an image and class count, at most: COCO's 100 or more."""
        return max(100, self._max_dets)

    @property
    def class_names(self) -> list[str]:
        """A name for each category, by ascending id; its id where it has none."""
        cats = self._ground_truth.cats
        return [str(cats[c].get("name", c)) for c in self.truth.category_ids.tolist()]

    def update(self, image_ids: Sequence[int], detections: Sequence[Detection]) -> None:
        """Take the detections of some images; an image fed again replaces its earlier ones.

        Labels without a category in the data set are dropped: the official 91-logit head has
        unused ones.

        Raises:
            ValueError: an image is not in the data set, or a number is not finite.
        """
        for image_id, detection in zip(image_ids, detections, strict=True):
            if image_id not in self._ground_truth.imgs:
                raise ValueError(f"image id {image_id} is not in the data set")
            self._by_image[image_id] = self._to_coco(image_id, detection)

    def _to_coco(self, image_id: int, detection: Detection) -> "_Columns":
        # float64 holds every float32 exactly, so the written numbers lose nothing.
        scores = detection["scores"].double().cpu()
        boxes_xyxy = detection["boxes"].double().cpu()
        if not (torch.isfinite(scores).all() and torch.isfinite(boxes_xyxy).all()):
            raise ValueError(f"image id {image_id}: a score or a box is not finite")
        boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1)
        labels = detection["labels"].tolist()
        known = [i for i, label in enumerate(labels) if label in self._category_of]
        category = [self._category_of[labels[i]] for i in known]
        return _Columns(
            np.array(category, dtype=np.int64), boxes_xywh.numpy()[known], scores.numpy()[known]
        )

    def found(self, image_ids: Collection[int] | None = None) -> Found:
        """Return what was fed so far (of some images) in few arrays, by ascending image id."""
        fed = self._by_image.keys()
        images = sorted(fed if image_ids is None else fed & set(image_ids))
        parts = [self._by_image[i] for i in images]
        empty = _Columns(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
        return Found(
            images=np.array(images, dtype=np.int64),
            image=np.repeat(np.array(images, dtype=np.int64), [len(p.score) for p in parts]),
            category=np.concatenate([empty.category, *(p.category for p in parts)]),
            box=np.concatenate([empty.box, *(p.box for p in parts)]),
            score=np.concatenate([empty.score, *(p.score for p in parts)]),
        )

    def take(self, found: Found) -> None:
        """Take what another evaluator of the data set has found, as `update` does."""
        order = np.argsort(found.image, kind="stable")
        starts = np.searchsorted(found.image[order], found.images)
        ends = np.searchsorted(found.image[order], found.images, side="right")
        for image, start, end in zip(found.images.tolist(), starts, ends, strict=True):
            rows = order[start:end]
            self._by_image[image] = _Columns(
                found.category[rows], found.box[rows], found.score[rows]
            )

    def detected(self) -> Detected:
        """Return what was fed so far, with positions in `truth`'s ids."""
        found, truth = self.found(), self.truth
        return Detected(
            image=np.searchsorted(truth.image_ids, found.image),
            category=np.searchsorted(truth.category_ids, found.category),
            box=found.box,
            score=found.score,
        )

    @property
    def detections(self) -> list[dict[str, Any]]:
        """Everything fed so far in the COCO results format, boxes as (x, y, w, h)."""
        return self.detections_on(self._by_image)

    def detections_on(self, image_ids: Collection[int]) -> list[dict[str, Any]]:
        """Return what was fed of some images in the COCO results format."""
        found = self.found(image_ids)
        columns = (found.image, found.category, found.box, found.score)
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def evaluate(self) -> EvalResult:
        """Compute the metrics over all images; one never fed counts as missed."""
        compute = self._by_pycocotools if self._backend == "pycocotools" else self._by_us
        result, beyond = compute(100), None
        if self._max_dets > 100:
            more = compute(self._max_dets)
            beyond = {"max_dets": float(self._max_dets), **_summary(more), "AR": _mean_of_valid(
                more.recall[:, :, 0, -1])}  # fmt: skip
        return EvalResult(
            stats=_stats(result),
            per_class=self._per_class(result),
            num_images=len(self._ground_truth.imgs),
            num_detections=sum(len(columns.score) for columns in self._by_image.values()),
            beyond_100=beyond,
        )

    def _by_us(self, max_dets: int) -> Accumulated:
        detected = self.detected()
        matches = match(self.truth, detected, max_dets=max_dets)
        return accumulate(self.truth, detected, matches, max_dets=(1, 10, max_dets))

    def _by_pycocotools(self, max_dets: int) -> Accumulated:
        with contextlib.redirect_stdout(io.StringIO()):
            results = COCO()
            results.dataset = {
                **{key: self._ground_truth.dataset[key] for key in ("images", "categories")},
                "annotations": [
                    {**d, "id": i, "area": d["bbox"][2] * d["bbox"][3]}
                    for i, d in enumerate(self.detections, start=1)
                ],
            }
            results.createIndex()
            evaluation = COCOeval(self._ground_truth, results, "bbox")
            evaluation.params.maxDets = [1, 10, max_dets]
            evaluation.evaluate()
            evaluation.accumulate()
        return Accumulated(evaluation.eval["precision"][..., -1], evaluation.eval["recall"])

    def _per_class(self, result: Accumulated) -> list[ClassResult]:
        truth = self.truth
        counts = np.bincount(truth.category[~truth.crowd], minlength=len(truth.category_ids))
        return [
            ClassResult(
                category_id=category_id,
                name=name,
                AP=_mean_of_valid(result.precision[:, :, k, 0]),
                AP50=_mean_of_valid(result.precision[0, :, k, 0]),
                num_boxes=int(counts[k]),
            )
            for k, (category_id, name) in enumerate(
                zip(truth.category_ids.tolist(), self.class_names, strict=True)
            )
        ]


@dataclass(frozen=True)
class _Columns:
    """The detections of one image."""

    category: NDArray[np.int64]
    box: NDArray[np.float64]
    score: NDArray[np.float64]


def _summary(result: Accumulated) -> dict[str, float]:
    """Return AP over all thresholds, at 0.5 and at 0.75."""
    precision = result.precision[..., 0]
    return {
        "AP": _mean_of_valid(precision),
        "AP50": _mean_of_valid(precision[0]),
        "AP75": _mean_of_valid(precision[5]),
    }


def _stats(result: Accumulated) -> dict[str, float]:
    """Return the 12 numbers by name."""
    sizes = range(1, 4)
    values = [
        *_summary(result).values(),
        *(_mean_of_valid(result.precision[..., a]) for a in sizes),
        *(_mean_of_valid(result.recall[:, :, 0, m]) for m in range(3)),
        *(_mean_of_valid(result.recall[:, :, a, 2]) for a in sizes),
    ]
    return dict(zip(STAT_NAMES, values, strict=True))


def _mean_of_valid(precision: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0


def _most_boxes(truth: Truth) -> int:
    """Return how many boxes of a class an image has at most; crowds do not count."""
    pair = (truth.image * len(truth.category_ids) + truth.category)[~truth.crowd]
    return int(np.unique(pair, return_counts=True)[1].max()) if len(pair) else 0


def _truth(coco: COCO) -> Truth:
    image_ids = np.array(sorted(coco.imgs), dtype=np.int64)
    category_ids = np.array(sorted(coco.cats), dtype=np.int64)
    annotations = coco.dataset["annotations"]

    def column(key: str, dtype: type) -> NDArray[Any]:
        return np.array([a[key] for a in annotations], dtype=dtype)

    return Truth(
        image_ids=image_ids,
        category_ids=category_ids,
        image=np.searchsorted(image_ids, column("image_id", np.int64)),
        category=np.searchsorted(category_ids, column("category_id", np.int64)),
        box=column("bbox", np.float64).reshape(-1, 4),
        area=column("area", np.float64),
        crowd=column("iscrowd", np.int64) != 0,
    )


def _numbered_copy(coco_gt: COCO) -> COCO:
    """Return the ground truth with ids from 1 and complete annotations; the given one stays."""
    copy = COCO()
    copy.dataset = {
        "images": coco_gt.dataset["images"],
        "categories": coco_gt.dataset["categories"],
        "annotations": [
            {
                **annotation,
                "id": i,
                "area": annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]),
                "iscrowd": annotation.get("iscrowd", 0),
            }
            for i, annotation in enumerate(coco_gt.dataset.get("annotations", []), start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        copy.createIndex()
    return copy


def save_results(
    output_dir: Path, result: EvalResult, detections: Sequence[Mapping[str, Any]] | None
) -> None:
    """Write `eval/results.json` and, if given, `eval/detections.json` (COCO results format)."""
    folder = output_dir / "eval"
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False)
    write_atomic(folder / "results.json", text + "\n", errors="backslashreplace")
    if detections is not None:
        text = json.dumps(list(detections), allow_nan=False)
        write_atomic(folder / "detections.json", text + "\n")
