"""One large image against the same objects in small ones: AP and memory of `eval --tile`.

`python -m tests.benchmarks.large_image --checkpoint runs/demo/last.pth` draws an image of 12,000 x
9,000 pixels: 48 x 36 scenes like the demo's, each with a background of its own, 400 small objects
in some of them. The same scenes are also saved as 1,728 images. The demo has only seen images of
another shape, so its model is first trained for some minutes, by `train --tile`, on four other
images of 2,000 x 2,000 pixels; `--epochs 0` leaves that out. `eval` then measures it on both: on
the small images as they are, and on the large one in tiles as large as a scene, which lie anywhere
over the scenes. Printed are AP, its ratio, the time and the peak memory of each process. The exit
code is 1 where the ratio is below 0.9, or the large image takes more memory than stated: that of
the small images and, of a TIFF, 150 MB, or of other files 5 bytes a pixel more.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from datasets.shapes import CATEGORY_IDS, DrawnObject, Scene, draw_image

ROOT = Path(__file__).resolve().parents[2]
SIDE, OVERLAP = 250, 0.25  # pixels of a scene and of a tile; no object is larger than the overlap
TRAINING_IMAGES, TRAINING_SIDE, TRAINING_OBJECTS = 4, 8, 240  # the side in scenes
LEAST_RATIO = 0.9
MOST_OF_PARTS, MOST_PER_PIXEL = 150e6, 5  # bytes above those of small images
Drawn = tuple[Image.Image, list[DrawnObject]]


@dataclass(frozen=True)
class Layout:
    """How many scenes a large image has, and the number of objects in all of them together."""

    columns: int
    rows: int
    objects: int
    scene: Scene = Scene((SIDE, SIDE), smallest=16, largest=60, fewest_objects=1, most_objects=8)


class CocoFolder:
    """A folder of images, and annotations that are written in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        (folder / "images").mkdir(parents=True)

    def place(self, name: str) -> Path:
        """Return where an image of that name is saved."""
        return self.folder / "images" / name

    def add(self, name: str, size: tuple[int, int], objects: Sequence[DrawnObject]) -> None:
        """Take an image of (width, height) with its objects."""
        number = len(self._images)
        image = {"id": number, "file_name": name, "width": size[0], "height": size[1]}
        self._images.append(image)
        for one in objects:
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": number,
                    "category_id": CATEGORY_IDS[one.name],
                    "bbox": list(one.box_xywh),
                    "area": one.area,
                    "iscrowd": 0,
                }
            )

    def write(self) -> Path:
        """Write the annotations, and return the folder."""
        categories = [{"id": i, "name": name} for name, i in CATEGORY_IDS.items()]
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": categories,
        }
        (self.folder / "annotations.json").write_text(json.dumps(content))
        return self.folder


def draw_scenes(layout: Layout, seed: int) -> list[Drawn]:
    """Draw all scenes by rows; which of them have objects is drawn, too."""
    count, scene, left = layout.rows * layout.columns, layout.scene, layout.objects
    drawn: dict[int, Drawn] = {}
    for number in np.random.default_rng((seed, count)).permutation(count).tolist():
        some = replace(
            scene,
            fewest_objects=min(left, scene.fewest_objects),
            most_objects=min(left, scene.most_objects),
        )
        drawn[number] = draw_image(np.random.default_rng((seed, number)), some)
        left -= len(drawn[number][1])
    if left:
        raise SystemExit(f"there is no room for {left} of the objects: use more scenes")
    return [drawn[number] for number in range(count)]


def join(layout: Layout, scenes: Sequence[Drawn]) -> tuple[NDArray[np.uint8], list[DrawnObject]]:
    """Return the large image that scenes make, and their objects in it."""
    canvas = np.zeros((layout.rows * SIDE, layout.columns * SIDE, 3), np.uint8)
    found = []
    for number, (image, objects) in enumerate(scenes):
        top, left = number // layout.columns * SIDE, number % layout.columns * SIDE
        canvas[top : top + SIDE, left : left + SIDE] = np.asarray(image)
        for one in objects:
            x, y, width, height = one.box_xywh
            found.append(replace(one, box_xywh=(x + left, y + top, width, height)))
    return canvas, found


def save_tiff(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Save an image in compressed parts of 256 x 256 pixels."""
    tifffile.imwrite(path, pixels, compression="deflate", tile=(256, 256), photometric="rgb")


def run(*words: str) -> tuple[int, float]:
    """Run `main.py` with these words; return its peak memory in bytes, and its seconds."""
    started, command = time.perf_counter(), [sys.executable, str(ROOT / "main.py"), *words]
    process = os.posix_spawn(sys.executable, command, {**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - started


def train(checkpoint: Path, folder: Path, seed: int, epochs: int) -> Path:
    """Train a checkpoint on tiles of large images; return the new one."""
    layout = Layout(TRAINING_SIDE, TRAINING_SIDE, TRAINING_OBJECTS)
    data = CocoFolder(folder / "training")
    for number in range(TRAINING_IMAGES):
        canvas, objects = join(layout, draw_scenes(layout, seed + 1 + number))
        name = f"{number}.tif"
        save_tiff(data.place(name), canvas)
        data.add(name, (canvas.shape[1], canvas.shape[0]), objects)
    data.write()
    _, seconds = run(
        "train", "--config", "shapes_tiny", "--finetune", str(checkpoint),
        "--train_images", str(data.folder / "images"),
        "--train_annotations", str(data.folder / "annotations.json"), "--no_validate",
        "--tile", "--tile_size", str(SIDE), "--tile_overlap", str(OVERLAP), "--tile_empty", "0.3",
        "--epochs", str(epochs), "--lr", "5e-4", "--lr_backbone", "5e-4", "--warmup_steps", "20",
        "--num_workers", "0", "--no_probe", "--no_tensorboard", "--output_dir", str(folder / "run"),
    )  # fmt: skip
    print(f"training on tiles: {epochs} epochs, {seconds:.0f} s")
    return folder / "run" / "last.pth"


def evaluate(checkpoint: Path, folder: Path, pixels: int, *more: str) -> tuple[float, int, float]:
    """Return AP, the peak memory of the process in bytes and its seconds."""
    peak, seconds = run(
        "eval", "--checkpoint", str(checkpoint), "--val_images", str(folder / "images"),
        "--val_annotations", str(folder / "annotations.json"), "--no_analysis",
        "--batch_size", "8", "--num_workers", "0", "--max_pixels", str(pixels),
        "--output_dir", str(folder), *more,
    )  # fmt: skip
    results = json.loads((folder / "eval" / "results.json").read_text())
    return float(results["stats"]["AP"]), peak, seconds


def compare(checkpoint: Path, folder: Path, layout: Layout, suffix: str, seed: int) -> int:
    """Evaluate on small images and on the large one, print what comes out; return the exit code."""
    scenes = draw_scenes(layout, seed)
    small, large = CocoFolder(folder / "small"), CocoFolder(folder / "large")
    for number, (image, objects) in enumerate(scenes):
        name = f"{number:04d}.png"
        image.save(small.place(name), compress_level=1)
        small.add(name, image.size, objects)
    canvas, objects = join(layout, scenes)
    name, (height, width) = f"large.{suffix}", canvas.shape[:2]
    if suffix == "tif":
        save_tiff(large.place(name), canvas)
    else:
        Image.fromarray(canvas).save(large.place(name), quality=95)
    large.add(name, (width, height), objects)
    pixels = height * width
    del canvas, scenes
    tiles = ("--tile", "--tile_size", str(SIDE), "--tile_overlap", str(OVERLAP))
    found = {
        "small images": evaluate(checkpoint, small.write(), pixels, "--no_tile"),
        "large image": evaluate(checkpoint, large.write(), pixels, *tiles),
    }
    for of, (ap, peak, seconds) in found.items():
        print(f"{of}: AP {ap:.4f}, peak memory {peak / 1e6:.0f} MB, {seconds:.0f} s")
    (whole, low, _), (ap, peak, _) = found.values()
    most = MOST_OF_PARTS if suffix == "tif" else MOST_PER_PIXEL * pixels
    print(
        f"{width} x {height} .{suffix}, {layout.objects} objects: {ap / whole:.3f} of the AP "
        f"(at least {LEAST_RATIO}), {(peak - low) / 1e6:.0f} MB more (at most {most / 1e6:.0f})"
    )
    return int(ap < LEAST_RATIO * whole or peak > low + most)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--checkpoint", type=Path, required=True, help="trained on shapes")
    parser.add_argument("--epochs", type=int, default=6, help="on tiles; default: %(default)s")
    parser.add_argument("--suffix", choices=("tif", "png", "jpg"), default="tif")
    parser.add_argument("--columns", type=int, default=48, help="scenes; default: %(default)s")
    parser.add_argument("--rows", type=int, default=36, help="scenes; default: %(default)s")
    parser.add_argument("--objects", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--keep", type=Path, help="save the trained checkpoint here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, checkpoint = Path(name), given.checkpoint.resolve()
        if given.epochs:
            checkpoint = train(checkpoint, folder, given.seed, given.epochs)
            if given.keep:
                given.keep.write_bytes(checkpoint.read_bytes())
        layout = Layout(given.columns, given.rows, given.objects)
        return compare(checkpoint, folder, layout, given.suffix, given.seed)


if __name__ == "__main__":
    sys.exit(_main())
