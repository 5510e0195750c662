"""Time the index of a COCO-train-sized file, and measure what loader workers add in memory.

    python -m tests.benchmarks.data_index

A generated file of 118,000 images and 860,000 boxes is indexed without the cache ("first") and with
it ("again"). Then loaders with 1 and 8 workers look up the name and boxes of every image without
decoding any, once in our index ("cached") and once in pycocotools' dictionaries. The memory is the
sum of the proportional set sizes of the process and its workers. Each measurement runs in a fresh
process.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset

from configs.schema import DataConfig
from datasets.build import load_index
from datasets.index import CocoIndex

WORKERS = (1, 8)
KINDS = ("first", "again", "cached", "pycocotools")
_IN_A_FOLDER = 40_000  # images; a file can have 65,000 links
_WITH_OUTLINES = 200_000  # images; larger sets have boxes alone


def write_set(folder: Path, num_images: int, num_boxes: int, num_classes: int) -> Path:
    """Write the annotation file a part at a time, and a link to an image for each of its images."""
    draw = np.random.default_rng(0)
    path, step = folder / "instances.json", 100_000
    names = [f"{i // _IN_A_FOLDER}/{i:012d}.jpg" for i in range(num_images)]
    for i in range(0, num_images, _IN_A_FOLDER):
        inside = folder / "images" / str(i // _IN_A_FOLDER)
        inside.mkdir(parents=True)
        Image.new("RGB", (640, 480)).save(inside / "image.jpg")
    for name in names:
        os.link(folder / "images" / name.split("/")[0] / "image.jpg", folder / "images" / name)
    box = np.concatenate([draw.uniform(0, 320, (step, 2)), draw.uniform(1, 160, (step, 2))], axis=1)
    outline = draw.uniform(0, 480, (step, 16)).round(2).tolist()
    category = draw.integers(1, num_classes + 1, step).tolist()
    ends = [  # the same for each part; ids are not
        json.dumps({"category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0, **shape})[1:]
        for c, b, shape in zip(
            category,
            box.round(2).tolist(),
            [{"segmentation": [o]} if num_images <= _WITH_OUTLINES else {} for o in outline],
            strict=True,
        )
    ]
    with path.open("w", encoding="ascii") as file:
        size = '"height": 480, "width": 640}'
        images = (f'{{"id": {i}, "file_name": "{name}", {size}' for i, name in enumerate(names))
        file.write('{"images": [' + ", ".join(images) + '], "annotations": [')
        for start in range(0, num_boxes, step):
            end = min(start + step, num_boxes)
            image = (np.arange(start, end) * num_images // num_boxes).tolist()
            file.write(", " if start else "")
            file.write(
                ", ".join(
                    f'{{"id": {n}, "image_id": {i}, {rest}'
                    for n, (i, rest) in enumerate(zip(image, ends, strict=False), start=start + 1)
                )
            )
        classes = [{"id": i, "name": f"class {i}"} for i in range(1, num_classes + 1)]
        file.write(f'], "categories": {json.dumps(classes)}}}')
    return path


def write_folder(folder: Path, num_images: int, num_boxes: int, data_format: str) -> None:
    """Write a folder of VOC's or YOLO's format, with an annotation file for each image."""
    draw, each = np.random.default_rng(0), num_boxes // num_images
    images = folder / ("JPEGImages" if data_format == "voc" else "images/train")
    labels = folder / ("Annotations" if data_format == "voc" else "labels/train")
    for made in (images, labels, folder / "ImageSets/Main"):
        made.mkdir(parents=True)
    names = [f"{i:012d}" for i in range(num_images)]
    if data_format == "voc":
        (folder / "ImageSets/Main/train.txt").write_text("\n".join(names))
    else:
        classes = [f"class {i}" for i in range(80)]
        (folder / "data.yaml").write_text(json.dumps({"train": "images/train", "names": classes}))
    for i, name in enumerate(names):
        if i % _IN_A_FOLDER == 0:
            Image.new("RGB", (640, 480)).save(images / f"{name}.jpg")
            first = images / f"{name}.jpg"
        else:
            os.link(first, images / f"{name}.jpg")
        kinds, corners = draw.integers(0, 80, each), draw.integers(1, 240, (each, 4))
        if data_format == "voc":
            objects = "".join(
                f"<object><name>class {k}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
                f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for k, (x, y, w, h) in zip(kinds.tolist(), corners.tolist(), strict=True)
            )
            size = "<size><width>640</width><height>480</height></size>"
            (labels / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        else:
            rows = zip(kinds.tolist(), (0.2 + corners / 500).tolist(), strict=True)
            text = "".join(f"{k} {x} {y} {w / 2} {h / 2}\n" for k, (x, y, w, h) in rows)
            (labels / f"{name}.txt").write_text(text)
    time.sleep(3)  # files that were written a moment ago are not kept


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
    start, processor = time.perf_counter(), time.process_time()
    if kind == "pycocotools":
        with contextlib.redirect_stdout(io.StringIO()):
            lookup = in_dictionaries(COCO(str(json_path)))
    elif json_path.is_dir():
        load_index(DataConfig(data_path=str(json_path)), "train")
    else:
        index = CocoIndex.load(json_path, json_path.parent / "images", need_boxes=True, cache=True)
        lookup = in_index(index)
    result: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    for workers in () if kind in ("first", "again") else WORKERS:
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
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--data_format", choices=("coco", "voc", "yolo"), default="coco")
    parser.add_argument("--folder", help="where the set is written for a while")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        kinds = args.kinds
        if args.data_format == "coco":
            json_path = write_set(folder, args.images, args.boxes, args.classes)
            print(f"{args.images} images, {args.boxes} boxes, {json_path.stat().st_size:,} bytes")
        else:
            json_path, kinds = folder / "data", ("first", "again")
            write_folder(json_path, args.images, args.boxes, args.data_format)
        for kind in kinds:
            results: multiprocessing.Queue[dict[str, Any]] = context.Queue()
            process = context.Process(target=measure, args=(kind, json_path, results))
            process.start()
            result = results.get()
            process.join()
            line = (
                f"{kind:12}{result['seconds']:6.1f} s, {result['processor']:.1f} s of a processor, "
                f"peak {result['peak']:.1f} GiB"
            )
            if "pss_1" in result:
                one, many = (result[f"pss_{workers}"] for workers in WORKERS)
                line += (
                    f"   PSS {one:6.0f} MB with 1 worker, {many:6.0f} MB with 8: {many - one:+.0f}"
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
