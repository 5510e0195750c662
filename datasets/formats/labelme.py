"""Read labelme's data: a JSON file of shapes for each image, beside it or in a folder of its own.

Every shape with an area becomes the box around it. Files are of a split if they are in its folder
(train/, val/ or valid/, test/); without such folders every split is all of them.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn

from datasets.formats.coco import parse_json
from datasets.formats.layout import (
    SPLITS,
    choose_split,
    files,
    mentions,
    split_names,
    subfolder,
    walk,
)
from datasets.formats.registry import (
    DIGITS,
    FORMATS,
    LARGEST_LIST,
    Format,
    Placer,
    Source,
    Split,
)
from util.errors import ConfigError, DataError
from util.files import read_regular

_KEYS = ("shapes", "imagePath")
# What is kept of files and shapes: the rest may be the whole image, and masks, as text.
_OF_FILE = (*_KEYS, "imageHeight", "imageWidth")
_OF_SHAPE = ("label", "shape_type", "points")
_NO_AREA = ("point", "points", "line", "linestrip")  # shapes that enclose nothing
_FOLDERS = ("labels", "annotations", "json", "jsons")  # where files are that lie in their own


def read_labelme(place: Path, split: str) -> Source:
    """Read a split. Classes are the labels of all splits, sorted, with ids from 1.

    Raises:
        DataError: there are no such files, or no shape has a label.
    """
    own = {name: f for name in SPLITS if (f := subfolder(place, *split_names(name)))}
    folder = own.get(split) or subfolder(place, split) or place
    if own and folder == place:
        raise DataError(
            f"{place}: there are no files of the split '{split}'. Splits there: {', '.join(own)}. "
            f"{choose_split(split)}"
        )
    unreadable: list[tuple[str, str]] = []
    every = dict(_read_files(place, unreadable))
    chosen = {path: found for path, found in every.items() if folder in path.parents}
    labels = {shape["label"] for found in every.values() for shape in _shapes(found)}
    if not chosen or not labels:
        raise DataError(f"{folder}: there are no labelme files with labelled shapes.")
    ids = {label: number for number, label in enumerate(sorted(labels), 1)}
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": label} for label, number in ids.items()],
    }
    for number, (path, found) in enumerate(chosen.items(), 1):
        size = {key: found.get(f"image{key.title()}") for key in ("height", "width")}
        name = _image_name(folder, path, str(found["imagePath"]))
        content["images"].append({"id": number, "file_name": name, **size})
        for shape in _shapes(found):
            box = _box(shape)
            if box is None:
                detail = f"{shape.get('shape_type')!r:.40} has no box"
                unreadable.append((path.relative_to(folder).as_posix(), detail))
                continue
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids[shape["label"]],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    findings = {"unreadable_annotation": unreadable}
    if not own:
        findings["odd_layout"] = [
            (place.name, f"no splits: every split is all {len(chosen)} files, train as val")
        ]
    return Source(content, folder, place, findings)


def has_labelme(place: Path) -> str:
    """Return a labelme file of a folder, "" if there is none."""
    own = (subfolder(place, *split_names(split)) for split in SPLITS)
    roots = [folder for folder in (place, *own) if folder]
    for folder in (*roots, *(subfolder(root, *_FOLDERS) for root in roots)):
        file = next(files(folder, ".json"), None) if folder else None
        if file and mentions(file, *_KEYS):
            return file.relative_to(place).as_posix()
    return ""


def _read_files(
    place: Path, unreadable: list[tuple[str, str]]
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the labelme files of a folder and all below; damaged ones are noted."""
    for path in walk(place, ".json"):
        try:
            found = parse_json(read_regular(path, LARGEST_LIST), path)
        except (OSError, DataError) as error:
            unreadable.append((path.name, str(error)))
            continue
        if isinstance(found.get("shapes"), list) and found.get("imagePath"):
            kept = {key: found[key] for key in _OF_FILE if key in found}
            yield path, {**kept, "shapes": list(map(_of_shape, found["shapes"]))}


def _of_shape(shape: Any) -> Any:
    if not isinstance(shape, Mapping):
        return shape
    return {key: shape[key] for key in _OF_SHAPE if key in shape}


def _shapes(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for shape in found["shapes"]:
        if isinstance(shape, Mapping) and isinstance(shape.get("label"), str) and shape["label"]:
            yield shape


def _image_name(folder: Path, path: Path, stated: str) -> str:
    """Return the image's file relative to the split's folder; `stated` is relative to the file."""
    written = PurePath(stated.replace("\\", "/"))
    name = written.name or path.stem
    beside = path.with_name(name)
    exact = Path(os.path.normpath(path.parent / written))
    for place in (exact, beside, folder / "images" / name, folder / name):
        if place.is_relative_to(folder) and os.path.isfile(place):
            return place.relative_to(folder).as_posix()
    return beside.relative_to(folder).as_posix()


def _box(shape: Mapping[str, Any]) -> list[float] | None:
    """Return the box around a shape, None where it has no area or is damaged."""
    if shape.get("shape_type") in _NO_AREA:
        return None
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
    except (KeyError, TypeError, ValueError, OverflowError):  # of a number of 400 digits
        return None
    if shape.get("shape_type") == "circle" and len(points) == 2:  # the centre, one on the edge
        (x, y), edge = points[0], points[1]
        radius = math.dist((x, y), edge)
        points = [(x - radius, y - radius), (x + radius, y + radius)]
    if len(points) < 2 or not all(math.isfinite(v) for point in points for v in point):
        return None
    left, top = (min(values) for values in zip(*points, strict=True))
    right, bottom = (max(values) for values in zip(*points, strict=True))
    box = [round(v, DIGITS) for v in (left, top, right - left, bottom - top)]
    return box if box[2] > 0 and box[3] > 0 else None


def write_labelme(splits: Sequence[Split], output_dir: Path, placer: Placer) -> NoReturn:
    """Refuse: nothing is written in this format.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("to labelme: it is read, not written. Choose coco, voc or yolo.")


FORMATS.register("labelme")(Format(read_labelme, write_labelme))
