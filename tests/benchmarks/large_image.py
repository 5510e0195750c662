"""One large image against the same objects in small ones: AP and memory of `eval --tile`.

`python -m tests.benchmarks.large_image --checkpoint runs/demo/last.pth` draws an image of 12,000 x
9,000 pixels: 40 x 40 scenes of the demo, each with a background of its own, 400 small objects in
some of them. The same scenes are also saved as 1,600 images. `eval` measures the checkpoint on
both: on the small images as they are, and on the large one in tiles as high as a scene, which lie
anywhere over the scenes. Printed are AP, its ratio, the time and the peak memory of each process.
The exit code is 1 where the ratio is below 0.9, or the large image takes more memory than stated:
that of the small images and, of a TIFF, 150 MB, or of other files 5 bytes a pixel more.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.shapes import CATEGORY_IDS, DrawnObject, Scene, draw_image

ROOT = Path(__file__).resolve().parents[2]
LEAST_RATIO = 0.9
MOST_OF_PARTS, MOST_PER_PIXEL = 150e6, 5  # bytes above those of small images


@dataclass(frozen=True)
class Layout:
    """How many scenes there are, their size and the number of objects in all of them together."""

    rows: int = 40
    columns: int = 40
    scene: Scene = Scene((300, 225), smallest=16, largest=60, fewest_objects=1, most_objects=8)
    objects: int = 400

    @property
    def size(self) -> tuple[int, int]:
        """Return the (width, height) of the large image."""
        return self.columns * self.scene.size[0], self.rows * self.scene.size[1]


def scenes(layout: Layout, seed: int) -> list[tuple[Image.Image, list[DrawnObject]]]:
    """Draw all scenes by rows; which of them have objects is drawn, too."""
    count, scene = layout.rows * layout.columns, layout.scene
    order = np.random.default_rng((seed, count)).permutation(count).tolist()
    drawn: dict[int, tuple[Image.Image, list[DrawnObject]]] = {}
    left = layout.objects
    for number in order:
        most = min(left, scene.most_objects)
        some = replace(scene, fewest_objects=min(left, scene.fewest_objects), most_objects=most)
        drawn[number] = draw_image(np.random.default_rng((seed, number)), some)
        left -= len(drawn[number][1])
    if left:
        raise SystemExit(f"there is no room for {left} of the objects: use more scenes")
    return [drawn[number] for number in range(count)]


def write(layout: Layout, folder: Path, suffix: str, seed: int) -> None:
    """Write small/ and large/, each with images and annotations.json."""
    width, height = layout.scene.size
    canvas: NDArray[np.uint8] = np.zeros((*layout.size[::-1], 3), np.uint8)
    found: dict[str, dict[str, list[Any]]] = {
        name: {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": name} for name, i in CATEGORY_IDS.items()],
        }
        for name in ("small", "large")
    }
    for name in found:
        (folder / name / "images").mkdir(parents=True)
    for number, (image, objects) in enumerate(scenes(layout, seed)):
        top, left = number // layout.columns * height, number % layout.columns * width
        canvas[top : top + height, left : left + width] = np.asarray(image)
        image.save(folder / "small" / "images" / f"{number:04d}.png", compress_level=1)
        found["small"]["images"].append(
            {"id": number, "file_name": f"{number:04d}.png", "width": width, "height": height}
        )
        for one in objects:
            x, y, w, h = one.box_xywh
            for name, image_id, box in (
                ("small", number, [x, y, w, h]),
                ("large", 0, [x + left, y + top, w, h]),
            ):
                annotations = found[name]["annotations"]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": CATEGORY_IDS[one.name],
                        "bbox": box,
                        "area": one.area,
                        "iscrowd": 0,
                    }
                )
    path = folder / "large" / "images" / f"large.{suffix}"
    if suffix == "tif":
        import tifffile

        tifffile.imwrite(path, canvas, compression="deflate", tile=(256, 256), photometric="rgb")
    else:
        Image.fromarray(canvas).save(path)
    found["large"]["images"].append(
        {"id": 0, "file_name": path.name, "width": layout.size[0], "height": layout.size[1]}
    )
    for name, content in found.items():
        (folder / name / "annotations.json").write_text(json.dumps(content))


def evaluate(checkpoint: Path, folder: Path, pixels: int, *more: str) -> tuple[float, int, float]:
    """Return AP, the peak memory of the process in bytes and its seconds."""
    command = [
        sys.executable, str(ROOT / "main.py"), "eval", "--checkpoint", str(checkpoint.resolve()),
        "--val_images", str(folder / "images"),
        "--val_annotations", str(folder / "annotations.json"), "--no_analysis", "--batch_size", "8",
        "--num_workers", "0", "--max_pixels", str(pixels), "--output_dir", str(folder), *more,
    ]  # fmt: skip
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, command, {**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"eval failed: {' '.join(command)}")
    results = json.loads((folder / "eval" / "results.json").read_text())
    return float(results["stats"]["AP"]), usage.ru_maxrss * 1024, seconds


def compare(checkpoint: Path, folder: Path, layout: Layout, suffix: str, overlap: float) -> int:
    """Evaluate on both sets, print what comes out; return the exit code."""
    pixels, side = layout.size[0] * layout.size[1], layout.scene.size[1]
    small = evaluate(checkpoint, folder / "small", pixels)
    tiles = ("--tile", "--tile_size", str(side), "--tile_overlap", str(overlap))
    large = evaluate(checkpoint, folder / "large", pixels, *tiles)
    more = MOST_OF_PARTS if suffix == "tif" else MOST_PER_PIXEL * pixels
    for name, (ap, peak, seconds) in (("small images", small), ("large image", large)):
        print(f"{name}: AP {ap:.4f}, peak memory {peak / 1e6:.0f} MB, {seconds:.0f} s")
    print(
        f"{layout.size[0]} x {layout.size[1]} .{suffix}, {layout.objects} objects: "
        f"{large[0] / small[0]:.3f} of the AP (at least {LEAST_RATIO}), "
        f"{(large[1] - small[1]) / 1e6:.0f} MB more (at most {more / 1e6:.0f})"
    )
    return int(large[0] < LEAST_RATIO * small[0] or large[1] > small[1] + more)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--checkpoint", type=Path, required=True, help="trained on shapes")
    parser.add_argument("--suffix", choices=("tif", "png", "jpg"), default="tif")
    parser.add_argument("--overlap", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--scenes", type=int, default=40, help="a side; default: %(default)s")
    parser.add_argument("--objects", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    given = parser.parse_args()
    layout = Layout(rows=given.scenes, columns=given.scenes, objects=given.objects)
    with tempfile.TemporaryDirectory() as folder:
        write(layout, Path(folder), given.suffix, given.seed)
        return compare(given.checkpoint, Path(folder), layout, given.suffix, given.overlap)


if __name__ == "__main__":
    sys.exit(_main())
