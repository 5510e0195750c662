"""Time the index of a COCO-train-sized file, and measure what loader workers add in memory.

    python -m tests.benchmarks.data_index

A generated file of 118,000 images and 860,000 boxes is indexed without and with the cache. Then
loaders with 1 and 8 workers look up the name and boxes of every image without decoding any, once in
our index and once in pycocotools' dictionaries. The memory is the sum of the proportional set sizes
of the process and its workers. Each measurement runs in a fresh process.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset

from datasets.index import CocoIndex

WORKERS = (1, 8)


def write_set(folder: Path, num_images: int, num_boxes: int) -> Path:
    """Write the annotation file, and an empty file for each image."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    names = [f"{number:012d}.jpg" for number in range(num_images)]
    for name in names:
        (folder / "images" / name).touch()
    images = [
        {"id": i, "file_name": name, "height": 480, "width": 640} for i, name in enumerate(names)
    ]
    corner, size = rng.uniform(0, 320, (num_boxes, 2)), rng.uniform(1, 160, (num_boxes, 2))
    outline = rng.uniform(0, 480, (num_boxes, 16)).round(2).tolist()
    boxes = np.concatenate([corner, size], axis=1).round(2).tolist()
    image, category = rng.integers(0, num_images, num_boxes), rng.integers(1, 81, num_boxes)
    annotations = [
        {
            "id": i + 1, "image_id": int(image[i]), "category_id": int(category[i]),
            "bbox": boxes[i], "area": boxes[i][2] * boxes[i][3], "iscrowd": 0,
            "segmentation": [outline[i]],
        }
        for i in range(num_boxes)
    ]  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


class Lookup(Dataset[int]):
    """The annotations that a loader looks up for an image."""

    def __init__(self, look_up: Callable[[int], int], length: int) -> None:
        self._look_up = look_up
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        return self._look_up(position)


def in_index(index: CocoIndex) -> Lookup:
    """Look images up in flat arrays."""

    def look_up(i: int) -> int:
        part = slice(index.first[i], index.first[i + 1])
        boxes, labels = index.boxes[part].copy(), index.labels[part].copy()
        size = index.images.sizes[i].tolist()
        return len(index.images.file_names[i]) + len(boxes) + len(labels) + len(size)

    return Lookup(look_up, len(index))


def in_dictionaries(coco: COCO) -> Lookup:
    """Look images up as torchvision's CocoDetection does."""
    ids = sorted(coco.imgs)

    def look_up(i: int) -> int:
        found = coco.loadAnns(coco.getAnnIds(imgIds=[ids[i]]))
        boxes = [annotation["bbox"] for annotation in found]
        return len(coco.loadImgs([ids[i]])[0]["file_name"]) + len(boxes)

    return Lookup(look_up, len(ids))


def proportional_mb(pids: list[int]) -> float:
    """Return the memory of processes in MB; what they share is counted once."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(re.findall(r"^Pss:\s+(\d+) kB", text, re.M)[0]) for text in texts) / 1000


def measure(kind: str, json_path: Path, results: "multiprocessing.Queue[dict[str, Any]]") -> None:
    """Build an index and run loaders over it, in a separate process."""
    warnings.filterwarnings("ignore", "This DataLoader will create")
    start = time.perf_counter()
    if kind == "pycocotools":
        with contextlib.redirect_stdout(io.StringIO()):
            lookup = in_dictionaries(COCO(str(json_path)))
    else:
        index = CocoIndex.load(json_path, json_path.parent / "images", need_boxes=True, cache=True)
        lookup = in_index(index)
    result: dict[str, Any] = {"seconds": time.perf_counter() - start}
    for workers in WORKERS if kind != "first" else ():
        loader = DataLoader(
            lookup, batch_size=500, num_workers=workers, persistent_workers=True,
            multiprocessing_context="fork",
        )  # fmt: skip
        for _ in loader:
            pass
        pids = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
        assert len(pids) == workers + 1
        result[f"pss_{workers}"] = proportional_mb(pids)
        del loader
        while multiprocessing.active_children():
            time.sleep(0.05)
    results.put(result)


def main() -> None:
    """Print a line for each kind of index."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        json_path = write_set(folder, args.images, args.boxes)
        print(f"{args.images} images, {args.boxes} boxes, {json_path.stat().st_size / 1e6:.0f} MB")
        for kind in ("first", "cached", "pycocotools"):
            results: multiprocessing.Queue[dict[str, Any]] = context.Queue()
            process = context.Process(target=measure, args=(kind, json_path, results))
            process.start()
            result = results.get()
            process.join()
            line = f"{kind:12}{result['seconds']:6.1f} s"
            if kind != "first":
                one, many = (result[f"pss_{workers}"] for workers in WORKERS)
                line += (
                    f"   PSS {one:6.0f} MB with 1 worker, {many:6.0f} MB with 8: {many - one:+.0f}"
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
