"""Time evaluation by ours, pycocotools and other packages on the same generated detections.

    python -m tests.benchmarks.evaluators

The way from detections in arrays to COCO's 12 numbers is timed, on one thread. Packages that are
not installed are left out. Each gets the detections in the fastest form that it takes.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")  # before any import

import argparse  # noqa: E402
import contextlib  # noqa: E402
import importlib.util  # noqa: E402
import io  # noqa: E402
import multiprocessing  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any, get_args  # noqa: E402

import numpy as np  # noqa: E402

from engine.evaluation.evaluator import Backend, Evaluator  # noqa: E402
from engine.evaluation.matching import Detections, Floats, Truth  # noqa: E402

PACKAGES = ("hotcoco", "ultrafast_pycocotools", "faster_coco_eval")


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


def with_package(name: str, truth: Truth, found: Detections) -> list[float]:
    """Return the 12 numbers of a package that has pycocotools' interface."""
    package = importlib.import_module(name)
    coco, evaluation = package.COCO, getattr(package, "COCOeval_faster", None)
    with contextlib.redirect_stdout(io.StringIO()):
        if name == "hotcoco":
            known = coco.from_arrays(
                [{"id": i} for i in truth.image_ids.tolist()],
                [{"id": c, "name": str(c)} for c in truth.category_ids.tolist()],
                truth.image_ids[truth.image],
                truth.category_ids[truth.category],
                truth.box,
                area=truth.area,
                iscrowd=truth.crowd.astype(np.uint8),
            )
        else:
            known = coco(_as_coco(truth))
        results = known.loadRes(_as_rows(truth, found))
        evaluation = (evaluation or package.COCOeval)(known, results, "bbox")
        for step in ("evaluate", "accumulate", "summarize"):
            getattr(evaluation, step)()
    return list(map(float, evaluation.stats[:12]))


def _as_coco(truth: Truth) -> dict[str, Any]:
    """Return the annotations as a COCO-format file holds them."""
    columns = (truth.image, truth.category, truth.box, truth.area, truth.crowd.astype(int))
    return {
        "images": [{"id": i} for i in truth.image_ids.tolist()],
        "categories": [{"id": c} for c in truth.category_ids.tolist()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": crowd}
            for n, (i, c, box, area, crowd) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), start=1
            )
        ],
    }


def _as_rows(truth: Truth, found: Detections) -> Floats:
    """Return detections as rows of image id, x, y, w, h, score and category id [D,7]."""
    image, category = truth.image_ids[found.image], truth.category_ids[found.category]
    return np.column_stack([image, found.box, found.score, category])


def measure_memory(name: str, args: argparse.Namespace) -> int:
    """Return by how many bytes an evaluation raises the peak memory of a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_added_memory, name, args).result()


def _added_memory(name: str, args: argparse.Namespace) -> int:
    truth, found = generate(args.images, args.detections, args.classes, seed=0)
    contender(name, *generate(2, 3, args.classes, seed=0))()  # imports what it needs
    before = _peak_memory()
    contender(name, truth, found)()
    return _peak_memory() - before


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def contender(name: str, truth: Truth, found: Detections) -> Callable[[], list[float]]:
    """Return what computes the 12 numbers."""
    if name in get_args(Backend):
        return partial(with_evaluator, truth, found, name)  # type: ignore[arg-type]
    return partial(with_package, name, truth, found)


def main() -> None:
    """Print the seconds of each, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=300, help="of an image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=(), choices=(*get_args(Backend), *PACKAGES))
    parser.add_argument("--memory", action="store_true", help="measure peak memory, not time")
    args = parser.parse_args()
    known = (*get_args(Backend), *filter(importlib.util.find_spec, PACKAGES))
    names = [name for name in known if name not in args.without]
    if args.memory:
        for name in names:
            print(f"{name:22} {measure_memory(name, args) / 2**20:8.0f} MiB", flush=True)
        return
    truth, found = generate(args.images, args.detections, args.classes, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    numbers: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name in names:
            evaluate = contender(name, truth, found)
            started = time.process_time()
            numbers[name] = evaluate()
            seconds[name].append(time.process_time() - started)
    for name, values in seconds.items():
        equal = "equal" if numbers[name] == numbers[names[0]] else f"differs from {names[0]}"
        print(
            f"{name:22} {statistics.median(values):8.2f} s  ({min(values):.2f} to "
            f"{max(values):.2f})  AP {numbers[name][0]:.17f}, {equal}"
        )


if __name__ == "__main__":
    main()
