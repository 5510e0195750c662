"""Read and write COCO data: a JSON file for each split, beside a folder of images."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.formats.coco_layouts import coco_layout, find_coco
from datasets.formats.coco_pieces import without_collection
from datasets.formats.others import looks_like
from datasets.formats.registry import FORMATS, Format, Placer, Source, Split
from datasets.formats.text import not_utf8
from util.errors import DataError
from util.files import make_output_dir, no_text, read_regular, write_atomic

LARGEST = 2**34  # bytes; the largest public set takes 6 GB


def read_coco(place: Path, split: str) -> Source:
    """Read a split of a folder in COCO's own layout, or in that of a tool.

    Raises:
        DataError: see `find_coco` and `read_coco_file`.
    """
    return read_coco_file(*find_coco(place, split))


def read_coco_file(path: Path, image_dir: Path) -> Source:
    """Read a COCO-format file, with the folder of its images.

    Raises:
        DataError: the file or the folder is not there, or the file is not JSON.
    """
    require_folder(image_dir)
    return Source(parse_coco(read_bytes(path), path), image_dir, path)


def require_folder(image_dir: Path) -> None:
    """Raise DataError unless the folder of images is there."""
    if not os.path.isdir(image_dir):
        raise DataError(f"{image_dir}: no such folder of images.")


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it is not there or cannot be read.
    """
    try:
        return read_regular(path, LARGEST)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such COCO-format JSON file. Check the path.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a COCO-format JSON file: {error}.") from error


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that the bytes of a file at `path` hold.

    Raises:
        DataError: they are not JSON in UTF-8, or another value.
    """
    if what := no_text(data):
        raise DataError(f"{path}: {what}.")
    if not data or data.isspace():
        raise DataError(f"{path}: not JSON: the file is empty. Write or download it again.")
    try:
        with without_collection():
            content = json.loads(data)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON: {error.msg} at line {error.lineno} column {error.colno}."
        ) from error
    except UnicodeDecodeError as error:
        what = not_utf8(error.object, error.start)
        raise DataError(f"{path}: {what}.") from error
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise DataError(f"{path}: not the JSON of a data set: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, not a {type(content).__name__}.")
    return content


def parse_coco(data: bytes, path: Path) -> dict[str, Any]:
    """Return what a COCO-format file holds, of which `data` are the bytes.

    Raises:
        DataError: see `parse_json`; it says what else the file may be.
    """
    try:
        return parse_json(data, path)
    except DataError as error:
        cause = error.__cause__
        lines = isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data"
        raise DataError(f"{error}{looks_like(path, lines=lines)}") from cause


def coco_content(split: Split) -> dict[str, Any]:
    """Return what a COCO-format file holds of a split; ids of images and classes stay."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in split.images:
        height, width = image.size
        size = {"height": height, "width": width} if height and width else {}
        images.append({"id": image.id, "file_name": image.name, **size})
        boxes = zip(image.labels, image.xywh, image.area, image.crowd, strict=True)
        annotations += [
            {
                "id": number,
                "image_id": image.id,
                "category_id": split.ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (label, box, area, crowd) in enumerate(boxes, len(annotations) + 1)
        ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(split.ids, split.class_names, strict=True)
        ],
    }


def write_coco(splits: Sequence[Split], output_dir: Path, placer: Placer) -> list[list[str]]:
    """Write splits in COCO's own layout; see `coco_content`."""
    make_output_dir(output_dir)
    for split in splits:
        annotation_file, image_dir = coco_layout(output_dir, split.name)
        for image in split.images:
            placer.put(image, image_dir / image.name)
        write_atomic(annotation_file, json.dumps(coco_content(split)))
    return [[] for _ in splits]


FORMATS.register("coco")(Format(read_coco, write_coco))
