"""Ground truth for pycocotools and the same in arrays, made without the product's readers."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pycocotools.coco import COCO

from engine.evaluation.evaluator import EvalResult, Evaluator
from engine.evaluation.matching import Detections, Truth


def make_coco(content: dict[str, Any]) -> COCO:
    """Return pycocotools' index of the content of a file."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def truth_of(coco: COCO) -> Truth:
    """Return the ground truth in arrays; areas and crowd flags may be missing."""
    image_ids, category_ids = sorted(coco.imgs), sorted(coco.cats)
    images = [coco.imgs[i] for i in image_ids]
    rows = coco.dataset["annotations"]
    return Truth(
        image_ids=np.array(image_ids, dtype=np.int64),
        file_names=[str(image.get("file_name", "")) for image in images],
        sizes=np.array([(i.get("height", 0), i.get("width", 0)) for i in images], dtype=np.int64),
        category_ids=np.array(category_ids, dtype=np.int64),
        class_names=[str(coco.cats[c].get("name", c)) for c in category_ids],
        image=np.array([image_ids.index(a["image_id"]) for a in rows], dtype=np.int64),
        category=np.array([category_ids.index(a["category_id"]) for a in rows], dtype=np.int64),
        box=np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4),
        area=np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in rows], dtype=np.float64),
        crowd=np.array([a.get("iscrowd", 0) for a in rows], dtype=np.bool_),
    )


def detections_of(
    coco: COCO,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    box: ArrayLike,
    score: ArrayLike,
) -> Detections:
    """Return detections, given as COCO's results name them."""
    images, categories = sorted(coco.imgs), sorted(coco.cats)
    return Detections(
        image=np.array([images.index(i) for i in image_ids], dtype=np.int64),
        category=np.array([categories.index(c) for c in category_ids], dtype=np.int64),
        box=np.array(box, dtype=np.float64).reshape(-1, 4),
        score=np.array(score, dtype=np.float64),
    )


def evaluator_with(coco: COCO, detections: Detections | None = None, **options: Any) -> Evaluator:
    """Return an evaluator to which detections were added."""
    evaluator = Evaluator(truth_of(coco), **options)
    if detections is not None:
        evaluator.add(detections)
    return evaluator


def both(coco: COCO, found: Detections, max_dets: int = 0) -> tuple[EvalResult, EvalResult]:
    """Return our result and pycocotools'."""
    ours = evaluator_with(coco, found, max_dets=max_dets)
    theirs = evaluator_with(coco, found, max_dets=max_dets, backend="pycocotools")
    return ours.evaluate(), theirs.evaluate()
