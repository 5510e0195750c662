"""Read YOLO data: images, and a text file of boxes for each, described by data.yaml.

A line is a class index, then the centre, width and height of a box as fractions of the image's
width and height; `yolo_lines` says what more numbers are. With `kpt_shape` in data.yaml, key points
follow the box and are skipped. `yolo_layout` knows where the files are, with data.yaml or without.
Fractions are of the upright image, after its EXIF orientation, as in the tools that write this
format. If that leaves the size as it is (mirrored, upside down or square), boxes are put on the
stored pixels, which training then uses.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.formats.layout import files
from datasets.formats.registry import DIGITS, FORMATS, Format, Source
from datasets.formats.stamps import Stamp
from datasets.formats.yolo_layout import LabelFiles, describe, find_images
from datasets.formats.yolo_lines import Lines, judge, read_lines
from datasets.formats.yolo_write import write_yolo
from datasets.images import TURNED, is_image_name, is_unread, read_header, stored_point
from util.errors import DataError, brief


def read_yolo(place: Path, split: str) -> Source:
    """Read a split; `place` is data.yaml, obj.data or their folder.

    Category ids are the class indices; images are numbered from 1 by name. An image without a
    label file has no boxes.

    Raises:
        DataError: what describes the set is missing or damaged, or the split names no images.
    """
    described = describe(place)
    categories = _categories(described.options, described.file)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    images, note = find_images(described, split)
    label_file = LabelFiles(images)
    root = Path(os.path.commonpath([image.parent for image in images]))
    named = sorted((image.relative_to(root).as_posix(), image) for image in images)
    read = [read_lines(label_file(image)) for _, image in named]
    lines = judge([found for found, _ in read], points=_points(described.options))
    unreadable = [one for _, wrong in read for one in wrong] + lines.wrong
    for position, (name, image) in enumerate(named):
        boxes = lines.boxes.get(position, [])
        entry = {"id": position + 1, "file_name": name}
        header = read_header(image)
        if header is None:
            content["images"].append(entry)
            unreadable += [(str(label_file(image)), "its image cannot be read")] if boxes else []
            continue
        # Of the upright image, so that it is turned.
        height, width = header[0][::-1] if header[1] in TURNED else header[0]
        content["images"].append({**entry, "height": height, "width": width})
        for category, box in boxes:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": position + 1,
                    "category_id": category,
                    **_in_pixels(box, (height, width), *header),
                    "iscrowd": 0,
                }
            )
    findings = {
        "unreadable_annotation": unreadable,
        "label_without_image": _orphans(label_file),
        "matched_name": _matched(label_file),
        "pixel_values": lines.pixels,
        "one_based_class": _one_based(content, place),
        "long_lines": [(place.name, text)] if (text := _told(lines)) else [],
        "odd_layout": [(place.name, note)] if note else [],
    }
    if not any(os.path.isfile(label_file(image)) for image in images):
        findings["odd_layout"] = [
            (place.name, f"no label files; the first would be {label_file(min(images))}")
        ]
    return Source(content, root, place, findings, folders=tuple(label_file.stems))


def stamp_yolo(place: Path, split: str, stamp: Stamp) -> None:
    """Add what decides what `read_yolo` returns: what describes the set, labels and images."""
    described = describe(place)
    stamp.add(str(described.file), str(described.root), described.options)
    images, note = find_images(described, split)
    stamp.add(note, list(map(str, images)))
    for folder, labels in sorted(LabelFiles(images).folders.items()):
        stamp.add_folder(folder)
        if labels != folder:
            stamp.add_folder(labels)


def _points(options: Mapping[str, Any]) -> int | None:
    """Return how many numbers follow a box, None if data.yaml says nothing of points."""
    shape = options.get("kpt_shape")
    whole = isinstance(shape, list) and all(isinstance(side, int) for side in shape)
    return math.prod(shape) if shape and whole else 0 if "kpt_shape" in options else None


def _told(lines: Lines) -> str:
    """Return how many lines were read as what, "" if all are plain boxes."""
    counts = lines.counts
    shown = ", ".join(f"{count} as {kind}" for kind, count in sorted(counts.items()))
    around = " (the box around each)" if counts["polygons"] else ""
    return f"lines read: {shown}{around}" if counts.keys() - {"boxes"} else ""


def _one_based(content: Mapping[str, Any], place: Path) -> list[tuple[str, str]]:
    """Return that classes seem to count from 1: none is 0, and one is past the last name."""
    used = {annotation["category_id"] for annotation in content["annotations"]}
    known = [category["id"] for category in content["categories"]]
    if not used or known != list(range(len(known))) or min(used) < 1 or max(used) != len(known):
        return []
    detail = f"indices {min(used)} to {max(used)} with {len(known)} names, of 0 to {known[-1]}"
    return [(place.name, detail)]


def _categories(options: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    names = options.get("names")
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if (
        not isinstance(numbered, dict)
        or not numbered
        or not all(isinstance(i, int) and 0 <= i < 2**31 for i in numbered)
    ):
        raise DataError(
            f"{file}: `names` must be a list or index: name pairs, not {brief(names)}. "
            "Name the classes."
        )
    return [{"id": int(i), "name": str(name)} for i, name in sorted(numbered.items())]


def _matched(label_file: LabelFiles) -> list[tuple[str, str]]:
    """Return the label files whose names are not just the images', but for the suffix's case."""
    pairs = (pair for own in label_file.spelled.values() for pair in own.items())
    return sorted(
        (name, f"has the labels of {stem!r}") for stem, name in pairs if name[:-4] != stem
    )


def _orphans(label_file: LabelFiles) -> list[tuple[str, str]]:
    """Return the label files next to those of the images that have boxes but no image."""
    orphans = []
    for folder, stems in sorted(label_file.stems.items()):
        there = folder.glob("*") if os.path.isdir(folder) else ()  # false for too long a name
        beside = [path for path in there if path.suffix.lower() != ".txt" and os.path.isfile(path)]
        others = {path.stem for path in beside if is_image_name(path.name)}  # of other splits, too
        known = stems | others
        unread = {path.stem: path.name for path in sorted(beside) if is_unread(path.name)}
        spelled = set(label_file.spelled[folder].values())
        for file in sorted(files(label_file.folders[folder], ".txt")):
            if file.stem not in known and file.name not in spelled:
                lines, wrong = read_lines(file)
                if lines and not wrong:  # otherwise a list of names or classes
                    name = unread.get(file.stem, "")
                    detail = f"there is {name!r}, of a kind that is not read" if name else ""
                    orphans.append((str(file), detail))
    return orphans


def _in_pixels(
    box: list[float], size: tuple[int, int], stored: tuple[int, int], orientation: int
) -> dict[str, Any]:
    """Return `bbox` and `area` in pixels of the (height, width) that is stated.

    If that is the size of the stored pixels, those will be used: the box is put on them.
    """
    cx, cy, w, h = box
    if size == stored:
        cx, cy = stored_point(cx, cy, orientation)
        w, h = (h, w) if orientation in TURNED else (w, h)
    height, width = size
    left, top = (cx - w / 2) * width, (cy - h / 2) * height
    xywh = [round(v, DIGITS) for v in (left, top, w * width, h * height)]
    return {"bbox": xywh, "area": xywh[2] * xywh[3]}


FORMATS.register("yolo")(Format(read_yolo, write_yolo, stamp=stamp_yolo))
