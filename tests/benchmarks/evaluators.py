"""Time evaluation by ours, pycocotools and faster-coco-eval on the same generated detections.

`python -m tests.benchmarks.evaluators` times the way from detections to COCO's 12 numbers.
"""

import argparse
import contextlib
import importlib.util
import io
import time
from collections.abc import Callable

import numpy as np
from pycocotools.coco import COCO

from engine.evaluation.evaluator import CocoEvaluator, Found


def generate(images: int, per_image: int, classes: int, seed: int) -> tuple[COCO, Found]:
    """Return a COCO-like set (7 boxes an image) and detections, a third of them on a box."""
    draw = np.random.default_rng(seed)
    count = 7 * images
    image, category = np.arange(count) // 7 + 1, draw.integers(1, classes + 1, count)
    size = 8 + 250 * draw.random((count, 2)) ** 2
    box = np.concatenate([draw.uniform(0, 400, (count, 2)), size], axis=1)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i + 1} for i in range(images)],
        "categories": [{"id": c + 1, "name": str(c)} for c in range(classes)],
        "annotations": [
            {"id": i + 1, "image_id": int(image[i]), "category_id": int(category[i]),
             "bbox": box[i].tolist(), "area": float(size[i].prod()), "iscrowd": int(i % 50 == 0)}
            for i in range(count)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    on_box = draw.integers(0, 7, (images, per_image)) + 7 * np.arange(images)[:, None]
    near = draw.random((images, per_image)) < 1 / 3
    moved = box[on_box] * draw.normal(1, 0.06, (images, per_image, 4))
    stray = np.concatenate(
        [draw.uniform(0, 400, (*near.shape, 2)), 8 + 250 * draw.random((*near.shape, 2))], axis=2
    )
    other = draw.integers(1, classes + 1, near.shape)
    found = Found(
        images=np.arange(1, images + 1),
        image=np.repeat(np.arange(1, images + 1), per_image),
        category=np.where(near, category[on_box], other).reshape(-1),
        box=np.where(near[..., None], moved, stray).reshape(-1, 4),
        score=draw.random(near.size) ** 2,
    )
    return coco, found


def with_evaluator(coco: COCO, found: Found, backend: str) -> list[float]:
    """Return the 12 numbers of an evaluator of ours, from detections in columns."""
    evaluator = CocoEvaluator(
        coco, {c: c for c in coco.cats}, backend="fast" if backend == "fast" else "pycocotools"
    )
    evaluator.take(found)
    return list(evaluator.evaluate().stats.values())


def with_faster_coco_eval(coco: COCO, found: Found) -> list[float]:
    """Return the 12 numbers of faster-coco-eval."""
    package = importlib.import_module("faster_coco_eval")
    evaluator = CocoEvaluator(coco, {c: c for c in coco.cats})
    evaluator.take(found)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = package.COCO(coco.dataset)
        evaluation = package.COCOeval_faster(truth, truth.loadRes(evaluator.detections), "bbox")
        evaluation.run()
    return list(map(float, evaluation.stats[:12]))


def main() -> None:
    """Print the seconds of each, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=300, help="of an image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    coco, found = generate(args.images, args.detections, args.classes, seed=0)
    tried: dict[str, Callable[[], list[float]]] = {
        "fast": lambda: with_evaluator(coco, found, "fast"),
        "pycocotools": lambda: with_evaluator(coco, found, "pycocotools"),
    }
    if importlib.util.find_spec("faster_coco_eval"):
        tried["faster-coco-eval"] = lambda: with_faster_coco_eval(coco, found)
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    numbers: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, evaluate in tried.items():
            started = time.perf_counter()
            numbers[name] = evaluate()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name:17} {seconds[name][-1]:8.2f} s, AP {numbers[name][0]:.17f}", flush=True)
    reference = float(np.median(seconds["pycocotools"]))
    for name, values in seconds.items():
        equal = "equal" if numbers[name] == numbers["pycocotools"] else "NOT EQUAL"
        median = float(np.median(values))
        print(f"{name:17} {median:8.2f} s  {reference / median:6.1f} times as fast, {equal}")


if __name__ == "__main__":
    main()
