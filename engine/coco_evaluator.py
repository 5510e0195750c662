"""COCO box metrics, computed by pycocotools."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from util.files import write_atomic

Detection = dict[str, Tensor]
"""`scores` [K], `labels` [K] int64, `boxes` [K,4] xyxy in pixels of the original picture."""

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

    Range: 0..1, or -1 where no ground truth exists to measure on.
    """

    stats: dict[str, float]
    per_class: list[ClassResult]
    num_images: int
    num_detections: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a result file."""
        return asdict(self)

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
        return "\n".join([*lines, "", *_class_lines(self.per_class)])


def _shown(value: float) -> str:
    return "n/a" if value < 0 else f"{value:.3f}"


def _class_lines(per_class: Sequence[ClassResult]) -> list[str]:
    """Return a table of the classes, in two blocks side by side when there are many."""
    if len(per_class) > _MOST_CLASSES_SHOWN:
        return [f"{len(per_class)} classes: too many to show, all are in the result file"]
    names = [
        c.name if len(c.name) <= _LONGEST_NAME else c.name[: _LONGEST_NAME - 1] + "…"
        for c in per_class
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
    """

    def __init__(self, coco_gt: COCO, label_to_category: Mapping[int, int]) -> None:
        categories = set(coco_gt.getCatIds())
        self._category_of = {k: c for k, c in label_to_category.items() if c in categories}
        self._ground_truth = _numbered_copy(coco_gt)
        self._by_image: dict[int, list[dict[str, Any]]] = {}

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

    def _to_coco(self, image_id: int, detection: Detection) -> list[dict[str, Any]]:
        # float64 holds every float32 exactly, so the written numbers lose nothing.
        scores = detection["scores"].double().cpu()
        boxes_xyxy = detection["boxes"].double().cpu()
        if not (torch.isfinite(scores).all() and torch.isfinite(boxes_xyxy).all()):
            raise ValueError(f"image id {image_id}: a score or a box is not finite")
        boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1)
        labels = detection["labels"].tolist()
        return [
            {
                "image_id": image_id,
                "category_id": self._category_of[label],
                "bbox": box,
                "score": score,
            }
            for label, box, score in zip(labels, boxes_xywh.tolist(), scores.tolist(), strict=True)
            if label in self._category_of
        ]

    def found(self) -> "Found":
        """Return what was fed so far in few arrays, to send to another process."""
        rows = self.detections
        return Found(
            images=np.array(sorted(self._by_image), dtype=np.int64),
            image=np.array([r["image_id"] for r in rows], dtype=np.int64),
            category=np.array([r["category_id"] for r in rows], dtype=np.int64),
            box=np.array([r["bbox"] for r in rows], dtype=np.float64).reshape(-1, 4),
            score=np.array([r["score"] for r in rows], dtype=np.float64),
        )

    def take(self, found: "Found") -> None:
        """Take what another evaluator of the data set has found, as `update` does."""
        self._by_image.update({image: [] for image in found.images.tolist()})
        columns = (found.image, found.category, found.box, found.score)
        for image, category, box, score in zip(*(c.tolist() for c in columns), strict=True):
            self._by_image[image].append(
                {"image_id": image, "category_id": category, "bbox": box, "score": score}
            )

    @property
    def detections(self) -> list[dict[str, Any]]:
        """Everything fed so far in the COCO results format, boxes as (x, y, w, h)."""
        return [d for image_id in sorted(self._by_image) for d in self._by_image[image_id]]

    def evaluate(self) -> EvalResult:
        """Compute the metrics over all images; one never fed counts as missed."""
        detections = self.detections
        with contextlib.redirect_stdout(io.StringIO()):
            results = COCO()
            results.dataset = {
                **{key: self._ground_truth.dataset[key] for key in ("images", "categories")},
                "annotations": [
                    {**d, "id": i, "area": d["bbox"][2] * d["bbox"][3]}
                    for i, d in enumerate(detections, start=1)
                ],
            }
            results.createIndex()
            evaluation = COCOeval(self._ground_truth, results, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return EvalResult(
            stats=dict(zip(STAT_NAMES, map(float, evaluation.stats), strict=True)),
            per_class=self._per_class(evaluation),
            num_images=len(self._ground_truth.imgs),
            num_detections=len(detections),
        )

    def _per_class(self, evaluation: COCOeval) -> list[ClassResult]:
        counts = dict.fromkeys(self._ground_truth.cats, 0)
        for annotation in self._ground_truth.dataset["annotations"]:
            counts[annotation["category_id"]] += not annotation["iscrowd"]
        # [T,R,K]: IoU thresholds, recalls, categories; all areas, 100 detections an image
        precision = evaluation.eval["precision"][..., 0, -1]
        return [
            ClassResult(
                category_id=category_id,
                name=str(self._ground_truth.cats[category_id].get("name", category_id)),
                AP=_mean_of_valid(precision[:, :, k]),
                AP50=_mean_of_valid(precision[0, :, k]),
                num_boxes=counts[category_id],
            )
            for k, category_id in enumerate(map(int, evaluation.params.catIds))
        ]


def _mean_of_valid(precision: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0


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
    output_dir: Path, result: EvalResult, detections: Sequence[Mapping[str, Any]]
) -> None:
    """Write `eval/results.json` and `eval/detections.json` (COCO results format)."""
    folder = output_dir / "eval"
    write_atomic(
        folder / "results.json", json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n"
    )
    write_atomic(folder / "detections.json", json.dumps(list(detections), allow_nan=False) + "\n")
