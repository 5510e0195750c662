"""Measure by how much `predict` and `eval` grow with the number of images.

    python -m tests.benchmarks.flat_memory --checkpoint runs/demo/last.pth

Each command runs in a fresh process on few and on many generated images. Its peak memory is that of
the main process, which alone keeps anything; loader processes hold a batch or two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from engine.detector import Detector


def write_set(folder: Path, count: int, category_ids: Sequence[int]) -> None:
    """Write images of 64x48 with one box each, and their annotations."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        pixels = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(folder / "images" / f"{i:06d}.jpg")
    content = {
        "images": [
            {"id": i, "file_name": f"{i:06d}.jpg", "width": 64, "height": 48} for i in range(count)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": category_ids[i % len(category_ids)],
             "bbox": [8, 8, 32, 24], "area": 768, "iscrowd": 0}
            for i in range(count)
        ],
        "categories": [{"id": i, "name": str(i)} for i in category_ids],
    }  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(content))


def peak_of(command: Sequence[str]) -> tuple[int, float]:
    """Return the peak memory in bytes of a command's main process, and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return 1024 * usage.ru_maxrss, time.perf_counter() - started


def main() -> None:
    """Print the growth of each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", type=int, nargs=2, default=(500, 3000), help="few and many")
    parser.add_argument("--of", type=int, default=118_287, help="images to extrapolate to")
    args = parser.parse_args()
    detector = Detector.load(args.checkpoint, device="cpu")
    ids = [detector.classes.ids[i] for i in range(len(detector.classes))]
    found: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        for count in args.images:
            folder = Path(name, str(count))
            write_set(folder, count, ids)
            main_py = [sys.executable, "main.py"]
            usual = ["--checkpoint", args.checkpoint, "--output_dir", str(folder / "out"),
                     "--num_workers", "1", "--batch_size", "8"]  # fmt: skip
            where = ["--val_images", str(folder / "images"), "--val_annotations",
                     str(folder / "instances.json")]  # fmt: skip
            small = ["--eval_scale", "48"]
            for command, options in {
                "predict": ["--input", str(folder / "images"), "--no_draw", *small],
                "eval": [*where, *small],
            }.items():
                peak, seconds = peak_of([*main_py, command, *usual, *options])
                found.setdefault(command, []).append(peak)
                print(f"{command:8} {count:6} images  {peak / 2**20:7.0f} MiB  {seconds:5.0f} s")
    few, many = args.images
    for command, (first, last) in found.items():
        each = (last - first) / (many - few)
        print(
            f"{command:8} {each / 1e3:6.1f} kB an image; {args.of} images: about "
            f"{(first + each * (args.of - few)) / 2**30:.1f} GiB"
        )


if __name__ == "__main__":
    main()
