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

from engine.evaluation.evaluator import Backend, Evaluator
from engine.evaluation.matching import Detections, Truth


def generate(images: int, per_image: int, classes: int, seed: int) -> tuple[Truth, Detections]:
    """Return a COCO-like set (7 boxes an image) and detections, a third of them on a box."""
    draw = np.random.default_rng(seed)
    count = 7 * images
    category = draw.integers(0, classes, count)
    size = 8 + 250 * draw.random((count, 2)) ** 2
    box = np.concatenate([draw.uniform(0, 400, (count, 2)), size], axis=1)
    truth = Truth(
        image_ids=np.arange(images),
        file_names=[""] * images,
        sizes=np.zeros((images, 2), dtype=np.int64),
        category_ids=np.arange(classes),
        class_names=[str(c) for c in range(classes)],
        image=np.arange(count) // 7,
        category=category,
        box=box,
        area=size.prod(axis=1),
        crowd=np.arange(count) % 50 == 0,
    )
    on_box = draw.integers(0, 7, (images, per_image)) + 7 * np.arange(images)[:, None]
    near = draw.random((images, per_image)) < 1 / 3
    moved = box[on_box] * draw.normal(1, 0.06, (images, per_image, 4))
    stray = np.concatenate(
        [draw.uniform(0, 400, (*near.shape, 2)), 8 + 250 * draw.random((*near.shape, 2))], axis=2
    )
    other = draw.integers(0, classes, near.shape)
    return truth, Detections(
        image=np.repeat(np.arange(images), per_image),
        category=np.where(near, category[on_box], other).reshape(-1),
        box=np.where(near[..., None], moved, stray).reshape(-1, 4),
        score=draw.random(near.size) ** 2,
    )


def with_evaluator(truth: Truth, found: Detections, backend: Backend) -> list[float]:
    """Return the 12 numbers of an evaluator of ours."""
    evaluator = Evaluator(truth, backend=backend)
    evaluator.add(found)
    return list(evaluator.evaluate().stats.values())


def with_faster_coco_eval(truth: Truth, found: Detections) -> list[float]:
    """Return the 12 numbers of faster-coco-eval."""
    package = importlib.import_module("faster_coco_eval")
    columns = (truth.image, truth.category, truth.box, truth.area, truth.crowd.astype(int))
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": crowd}
        for n, (i, c, box, area, crowd) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = package.COCO(
            {
                "images": [{"id": i} for i in truth.image_ids.tolist()],
                "categories": [{"id": c} for c in truth.category_ids.tolist()],
                "annotations": annotations,
            }
        )
        evaluation = package.COCOeval_faster(coco, coco.loadRes(found.to_coco(truth)), "bbox")
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
    truth, found = generate(args.images, args.detections, args.classes, seed=0)
    tried: dict[str, Callable[[], list[float]]] = {
        "fast": lambda: with_evaluator(truth, found, "fast"),
        "pycocotools": lambda: with_evaluator(truth, found, "pycocotools"),
    }
    if importlib.util.find_spec("faster_coco_eval"):
        tried["faster-coco-eval"] = lambda: with_faster_coco_eval(truth, found)
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
