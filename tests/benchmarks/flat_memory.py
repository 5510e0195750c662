"""Measure by how much `predict` and `eval` grow with the number of images.

    python -m tests.benchmarks.flat_memory --checkpoint runs/demo/last.pth
    python -m tests.benchmarks.flat_memory --without_model --images 5000 118287

Each command runs in a fresh process on few and on many generated images. Its peak memory is that of
the main process, which alone keeps anything; loader processes hold a batch or two.

`--without_model` gives generated detections, with scores and corners in float32, to what `eval`
does after the model. It prints the peak of each number of images after each of its parts.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.detector import Detector
from engine.evaluation.analysis import analyse, save_analysis
from engine.evaluation.evaluator import Evaluator, save_results
from tests.benchmarks.evaluators import generate

AT_ONCE = 500  # images that are generated together
COMMANDS = ("predict", "eval")


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


def evaluate_generated(images: int, detections: int, classes: int) -> None:
    """Evaluate as `eval` does, and print the peak of this process, in MiB, after each part."""
    starts = range(0, images, AT_ONCE)
    counts = [min(AT_ONCE, images - start) for start in starts]
    whole = [generate(count, 1, classes, seed)[0] for seed, count in enumerate(counts)]
    columns: dict[str, Any] = {}
    for name in ("box", "area", "crowd", "category"):
        columns[name] = np.concatenate([getattr(truth, name) for truth in whole])
    columns["image"] = np.concatenate(
        [truth.image + start for start, truth in zip(starts, whole, strict=True)]
    )
    columns["image_ids"] = np.arange(images)
    columns["file_names"] = [""] * images
    columns["sizes"] = np.zeros((images, 2), dtype=np.int64)
    evaluator = Evaluator(replace(whole[0], **columns))

    def show(part: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"  {part:28} {peak:8.0f} MiB  {time.process_time():6.0f} s", flush=True)

    show("ground truth")
    for seed, (start, count) in enumerate(zip(starts, counts, strict=True)):
        found = generate(count, detections, classes, seed)[1]
        corners = found.box.copy()
        corners[:, 2:] += corners[:, :2]
        for image in range(count):
            rows = slice(image * detections, (image + 1) * detections)
            output = {
                "scores": torch.from_numpy(found.score[rows]).float(),
                "labels": torch.from_numpy(found.category[rows]),
                "boxes": torch.from_numpy(corners[rows]).float(),
            }
            evaluator.update([start + image], [output])
    show("detections collected")
    result = evaluator.evaluate()
    show("COCO's numbers")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "eval").mkdir()
        save_results(Path(folder), result, evaluator)
        show("detections.json")
        analysis = analyse(evaluator, result)
        show("analysis")
        save_analysis(Path(folder), analysis, {}, title="generated")
        show("report")


def main() -> None:
    """Print the growth of each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint")
    which.add_argument("--without_model", action="store_true")
    which.add_argument("--evaluate", type=int, help=argparse.SUPPRESS)  # in a fresh process
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--images", type=int, nargs=2, default=(500, 3000), help="few and many")
    parser.add_argument("--of", type=int, default=118_287, help="images to extrapolate to")
    parser.add_argument("--detections", type=int, default=100, help="of an image, generated")
    parser.add_argument("--classes", type=int, default=80, help="of generated detections")
    args = parser.parse_args()
    if args.evaluate:
        evaluate_generated(args.evaluate, args.detections, args.classes)
        return
    if args.without_model:
        own = [sys.executable, "-m", "tests.benchmarks.flat_memory", "--classes", str(args.classes),
               "--detections", str(args.detections)]  # fmt: skip
        for count in args.images:
            print(f"{count} images", flush=True)
            subprocess.run([*own, "--evaluate", str(count)], check=True)
        return
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
            inputs = {"predict": ["--input", str(folder / "images"), "--no_draw"], "eval": where}
            for command in args.commands:
                peak, seconds = peak_of([*main_py, command, *usual, *inputs[command], *small])
                found.setdefault(command, []).append(peak)
                line = f"{command:8} {count:6} images  {peak / 2**20:7.0f} MiB  {seconds:5.0f} s"
                print(line, flush=True)
    few, many = args.images
    for command, (first, last) in found.items():
        each = (last - first) / (many - few)
        print(
            f"{command:8} {each / 1e3:6.1f} kB an image; {args.of} images: about "
            f"{(first + each * (args.of - few)) / 2**30:.1f} GiB"
        )


if __name__ == "__main__":
    main()
