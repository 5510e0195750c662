"""The generated `shapes` data set, in COCO layout: `python -m datasets.shapes --output_dir DIR`.

Every object has the exact extent of what is visible of it.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from datasets.arrays import FloatArray
from datasets.formats.coco import coco_content
from datasets.formats.coco_layouts import coco_layout
from datasets.formats.registry import Split, SplitImage, write_text
from util.errors import DataError, UserError

SUBPIXELS = 4  # masks are drawn this much finer than the image, in each direction
MIN_VISIBLE = 0.75  # an object may lose at most a quarter of itself to the ones drawn over it
_ATTEMPTS = 8
_VERSION = 4  # counts changes of the drawing, so that an old folder is not taken for a new one
_FIRST_IMAGE_ID = {"train": 1, "val": 500_000}


@dataclass(frozen=True)
class Scene:
    """A kind of image: its (width, height), and the sizes of objects, in pixels, and their number.

    One size for all images, so that no batch is padded.
    """

    size: tuple[int, int] = (288, 216)
    smallest: float = 20
    largest: float = 150
    fewest_objects: int = 1
    most_objects: int = 12


# By name. Crowded scenes show what a detector does with many small objects in large images; in
# small ones all objects are what COCO calls small.
SCENES = {
    "usual": Scene(),
    "small": Scene(smallest=12, largest=28, fewest_objects=4, most_objects=24),
    "crowded": Scene((640, 480), smallest=16, largest=64, fewest_objects=20, most_objects=60),
}
USUAL = SCENES["usual"]


def _polar(radii: list[float]) -> FloatArray:
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


_CROSS = np.array(
    [
        *[(1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3)],
        *[(-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3)],
    ]
)
# Outlines in units of half the object's size; a second outline is a hole.
OUTLINES: dict[str, tuple[FloatArray, ...]] = {
    "circle": (_polar([1.0] * 64),),
    "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85,),
    "triangle": (_polar([1.1] * 3),),
    "star": (_polar([1.1, 0.45] * 5),),
    "cross": (_CROSS,),
    "ring": (_polar([1.0] * 64), _polar([0.55] * 64)),
}
# Ids have gaps and are not in order of name, as in real data.
CATEGORY_IDS = {"square": 3, "star": 7, "circle": 11, "ring": 18, "triangle": 24, "cross": 52}


@dataclass(frozen=True)
class DrawnObject:
    """What is visible of one object: `box_xywh` in pixels, `area` in square pixels."""

    name: str
    box_xywh: tuple[float, float, float, float]
    area: float


@dataclass
class _Shape:
    """An object to place: the pixels around it, and its mask in subpixels.

    `area` counts the subpixels of the mask, `visible` those that later objects leave.
    """

    name: str
    rows: slice
    columns: slice
    mask: Image.Image
    area: int
    visible: int


def draw_image(
    rng: np.random.Generator, scene: Scene = USUAL
) -> tuple[Image.Image, list[DrawnObject]]:
    """Draw an image of a scene, later objects on top; there may be no room for some of them."""
    canvas = _background(rng, scene.size)
    columns_of_all, rows_of_all = scene.size
    placed: list[_Shape] = []
    # Which object is seen at each subpixel, counted from 1: [H,4,W,4].
    front = np.zeros((rows_of_all, SUBPIXELS, columns_of_all, SUBPIXELS), dtype=np.int8)
    for _ in range(int(rng.integers(scene.fewest_objects, scene.most_objects + 1))):
        new = _place(rng, front, placed, scene)
        if new is not None:
            _paint(rng, canvas, new)
            placed.append(new)
    grain = int(rng.integers(0, 13))
    canvas += rng.integers(-grain, grain + 1, size=canvas.shape, dtype=np.int8)
    objects = []
    whole = front.reshape(rows_of_all * SUBPIXELS, columns_of_all * SUBPIXELS)
    extents = ndimage.find_objects(whole)
    for shape, (rows, columns) in zip(placed, extents, strict=True):
        x, y = columns.start / SUBPIXELS, rows.start / SUBPIXELS
        width, height = columns.stop / SUBPIXELS - x, rows.stop / SUBPIXELS - y
        objects.append(DrawnObject(shape.name, (x, y, width, height), shape.visible / SUBPIXELS**2))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), objects


def _background(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return a colour gradient [H,W,3] in 0..255, plain, striped or blotched."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
    start, end = rng.uniform(20, 235, size=(2, 3)).astype(np.float32)
    canvas = np.asarray(start + (end - start) * (along[..., None] + 0.5), dtype=np.float32)
    texture, strength = int(rng.integers(3)), rng.uniform(10, 35)
    if texture == 1:
        direction, period = rng.uniform(0, np.pi), rng.uniform(8, 40)
        phase = (np.cos(direction) * x + np.sin(direction) * y) * (2 * np.pi / period)
        canvas += np.float32(strength) * np.sin(phase, dtype=np.float32)[..., None]
    elif texture == 2:
        coarse = rng.integers(0, 256, size=(8, 10, 3), dtype=np.uint8)
        blotches = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        canvas += (np.asarray(blotches, dtype=np.float32) - 128) * np.float32(strength / 90)
    return canvas


def _place(
    rng: np.random.Generator, front: NDArray[np.int8], placed: list[_Shape], scene: Scene
) -> _Shape | None:
    """Find room for a new object and put it in front; None where it would hide too much."""
    for _ in range(_ATTEMPTS):
        new = _random_shape(rng, scene)
        seen = front[new.rows, :, new.columns]
        mask = (np.asarray(new.mask) > 0).reshape(seen.shape)
        hidden = np.bincount(seen[mask], minlength=len(placed) + 1)[1:].tolist()
        left = [shape.visible - lost for shape, lost in zip(placed, hidden, strict=True)]
        if all(rest >= MIN_VISIBLE * s.area for s, rest in zip(placed, left, strict=True)):
            for shape, rest in zip(placed, left, strict=True):
                shape.visible = rest
            seen[mask] = len(placed) + 1
            return new
    return None


def _random_shape(rng: np.random.Generator, scene: Scene) -> _Shape:
    name = list(OUTLINES)[int(rng.integers(len(OUTLINES)))]
    most = min(scene.largest, 0.7 * min(scene.size))
    # small ones more often
    size = float(rng.uniform(np.sqrt(scene.smallest), np.sqrt(most)) ** 2)
    margin = 0.3 * size  # the image's border may cut an object, but not its middle
    width, height = scene.size
    centre = rng.uniform((margin, margin), (width - margin, height - margin))
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * (size / 2)
    outlines = [outline @ turn + centre for outline in OUTLINES[name]]
    left, top = np.maximum(np.floor(outlines[0].min(0)) - 1, 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(outlines[0].max(0)) + 1, scene.size).astype(int).tolist()
    mask = Image.new("L", ((right - left) * SUBPIXELS, (bottom - top) * SUBPIXELS))
    pen = ImageDraw.Draw(mask)
    for fill, outline in zip((255, 0), outlines, strict=False):
        # ImageDraw puts the centre of a subpixel at whole coordinates.
        points = (outline - (left, top)) * SUBPIXELS - 0.5
        pen.polygon([(float(px), float(py)) for px, py in points], fill=fill)
    area = int(np.count_nonzero(np.asarray(mask)))
    return _Shape(name, slice(top, bottom), slice(left, right), mask, area, area)


def _paint(rng: np.random.Generator, canvas: NDArray[np.float32], new: _Shape) -> None:
    """Blend the object into the image by its coverage of each pixel."""
    coverage = np.asarray(new.mask.reduce(SUBPIXELS), dtype=np.float32)[..., None] / 255
    behind = canvas[new.rows, new.columns]
    mean = np.average(behind, axis=(0, 1), weights=np.broadcast_to(coverage, behind.shape))
    colour = rng.uniform(0, 255, size=3)
    while np.abs(colour - mean).sum() < 170:  # until one stands out from what is behind
        colour = rng.uniform(0, 255, size=3)
    shade = np.linspace(-1, 1, coverage.shape[1], dtype=np.float32)[:, None] * rng.uniform(-20, 20)
    behind += coverage * (colour + shade - behind).astype(np.float32)


def generate_shapes(
    output_dir: Path, *, num_train: int, num_val: int, seed: int, scene: str = "usual"
) -> None:
    """Write train2017/, val2017/ and annotations/ of drawn shapes with their exact boxes.

    An image depends on (scene, seed, split, index) alone. A folder that already holds exactly
    this set is left as it is; an interrupted run leaves none.

    Raises:
        DataError: `output_dir` holds anything else.
    """
    wanted = {
        split: _info(split, count, seed, scene)
        for split, count in (("train", num_train), ("val", num_val))
    }
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        _check_existing(output_dir, wanted)
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".shapes-") as scratch:
        unfinished = Path(scratch) / "set"
        for split, info in wanted.items():
            _write_split(unfinished, split, info)
        if output_dir.exists():
            output_dir.rmdir()
        unfinished.rename(output_dir)


def _info(split: str, count: int, seed: int, scene: str) -> dict[str, Any]:
    info = {
        "description": "drawn shapes",
        "generator": "shapes",
        "generator_version": _VERSION,
        "split": split,
        "num_pictures": count,
        "seed": seed,
    }
    return info if scene == "usual" else {**info, "scene": scene}


def _check_existing(folder: Path, wanted: dict[str, dict[str, Any]]) -> None:
    for split, info in wanted.items():
        count = info["num_pictures"]
        annotation_file, image_dir = coco_layout(folder, split)
        try:
            found = json.loads(annotation_file.read_text(encoding="utf-8"))["info"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, dict) or found.get("generator") != "shapes":
            raise DataError(
                f"`output_dir {folder}`: the folder has other content. Choose a new or empty one."
            )
        if found != info:
            raise DataError(
                f"`output_dir {folder}`: it holds {found.get('num_pictures')} {split} images of "
                f"{found.get('scene', 'usual')} scenes, seed {found.get('seed')} (drawing version "
                f"{found.get('generator_version')}), not {count} of {info.get('scene', 'usual')} "
                f"scenes, seed {info['seed']} (version {_VERSION}). Delete it or choose another "
                "folder."
            )
        if sum(1 for _ in image_dir.glob("*.jpg")) != count:
            raise DataError(
                f"{image_dir}: some of the {count} images are gone. "
                "Delete the folder and generate it again."
            )


def _write_split(folder: Path, split: str, info: dict[str, Any]) -> None:
    annotation_file, image_dir = coco_layout(folder, split)
    image_dir.mkdir(parents=True)
    names = list(CATEGORY_IDS)
    images = []
    scene = SCENES[info.get("scene", "usual")]
    for index in range(info["num_pictures"]):
        key = (info["seed"], list(_FIRST_IMAGE_ID).index(split), index)
        image, objects = draw_image(np.random.default_rng(key), scene)
        image_id = _FIRST_IMAGE_ID[split] + index
        file = image_dir / f"{image_id:06d}.jpg"
        image.save(file, quality=92, subsampling=0)
        images.append(
            SplitImage(
                id=image_id,
                name=file.name,
                file=file,
                size=(image.height, image.width),
                labels=[names.index(one.name) for one in objects],
                xywh=[list(one.box_xywh) for one in objects],
                area=[one.area for one in objects],
                crowd=[False] * len(objects),
            )
        )
    drawn = coco_content(Split(split, tuple(CATEGORY_IDS.values()), tuple(names), images))
    write_text(annotation_file, json.dumps({"info": info, **drawn}))


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m datasets.shapes", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    for flag, default in (("--num_train", 2800), ("--num_val", 200), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default, help="default: %(default)s")
    parser.add_argument(
        "--scene",
        choices=list(SCENES),
        default="usual",
        help="crowded: 20 to 60 objects of 16 to 64 pixels in images of 640x480; small: 4 to 24 "
        "of 12 to 28 pixels",
    )
    args = parser.parse_args()
    try:
        generate_shapes(**vars(args))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.output_dir}: {args.num_train} training and {args.num_val} validation images.")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
