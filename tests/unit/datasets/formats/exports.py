"""Data sets of two classes as tools export them: in every image a kettle and a mug."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

WIDTH, HEIGHT = 100, 80
KETTLE, MUG = (10, 20, 30, 40), (60, 10, 20, 30)  # x, y, width, height
NAMES = ("kettle", "mug")
TRUTH = {(name, *map(float, box)) for name, box in zip(NAMES, (KETTLE, MUG), strict=True)}


def save_images(folder: Path, count: int = 3, suffix: str = ".png", first: int = 1) -> list[Path]:
    """Write images called shot_1, shot_2, ... and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"shot_{k}{suffix}" for k in range(first, first + count)]
    for number, path in enumerate(paths):
        file_format = "JPEG" if suffix == ".jfif" else None
        Image.new("RGB", (WIDTH, HEIGHT), (9 * number, 90, 90)).save(path, file_format)
    return paths


def coco_content(names: list[str]) -> dict[str, Any]:
    """Return the content of a COCO-format file on images of these names."""
    return {
        "images": [
            {"id": k, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for k, name in enumerate(names, 1)
        ],
        "annotations": [
            {"id": 2 * k + c, "image_id": k, "category_id": c, "bbox": list(box), "iscrowd": 0,
             "area": box[2] * box[3]}
            for k in range(1, len(names) + 1) for c, box in enumerate((KETTLE, MUG), 1)
        ],
        "categories": [
            {"id": c, "name": name, "supercategory": ""} for c, name in enumerate(NAMES, 1)
        ],
    }  # fmt: skip


def write_coco(file: Path, images: Path, *, names: Callable[[Path], str] | None = None) -> None:
    """Write images, and a COCO-format file on them."""
    paths = save_images(images)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(coco_content([names(p) if names else p.name for p in paths])))


def voc_object(name: str, box: tuple[int, ...]) -> str:
    """Return an object whose tags hold edges."""
    x, y, w, h = box
    tags = zip(("xmin", "ymin", "xmax", "ymax"), (x, y, x + w, y + h), strict=True)
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


def voc_text(body: str | None = None, name: str = "") -> str:
    """Return the text of an XML file."""
    body = voc_object("kettle", KETTLE) + voc_object("mug", MUG) if body is None else body
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return f"<annotation><filename>{name}</filename>\n{size}{body}</annotation>"


def write_voc(annotations: Path, images: Path, *, suffix: str = ".png", first: int = 1) -> None:
    """Write images, and an XML file for each."""
    annotations.mkdir(parents=True, exist_ok=True)
    for path in save_images(images, suffix=suffix, first=first):
        (annotations / f"{path.stem}.xml").write_text(voc_text(name=path.name))


def yolo_line(label: int, box: tuple[int, ...], more: str = "") -> str:
    """Return a line of a label file."""
    x, y, w, h = box
    values = ((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT)
    return f"{label} {' '.join(f'{value:.6f}' for value in values)}{more}\n"


LINES = yolo_line(0, KETTLE) + yolo_line(1, MUG)


def write_yolo(
    images: Path, labels: Path, *, lines: str = LINES, suffix: str = ".png", first: int = 1
) -> None:
    """Write images, and a label file for each."""
    labels.mkdir(parents=True, exist_ok=True)
    for path in save_images(images, suffix=suffix, first=first):
        (labels / f"{path.stem}.txt").write_text(lines)


def write_yaml(folder: Path, **options: Any) -> None:
    """Write data.yaml of the two classes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{key}: {value}\n" for key, value in options.items())
    (folder / "data.yaml").write_text(f"{text}names: [kettle, mug]\n")
