"""Read and write YOLO data: data.yaml, images in images/ and a text file for each in labels/.

A line is a class index, then the centre, width and height of a box as fractions of the image's
width and height, or the corners of a polygon, which becomes the box around it. With `kpt_shape` in
data.yaml, key points follow the box and are skipped. Fractions are of the upright image, after its
EXIF orientation, as in the tools that write this format. If that leaves the size as it is
(mirrored, upside down or square), boxes are put on the stored pixels, which training then uses.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from datasets.checks.findings import first_few
from datasets.formats.registry import (
    DIGITS,
    FORMATS,
    LARGEST_LIST,
    Format,
    Placer,
    Source,
    Split,
    as_text,
    read_list,
    write_text,
)
from datasets.images import TURNED, is_image, read_header, stored_point, upright_point
from util.errors import DataError, brief
from util.files import make_output_dir, read_regular, write_atomic
from util.yaml_files import read_yaml


def read_yolo(place: Path, split: str) -> Source:
    """Read a split; `place` is data.yaml or its folder.

    Category ids are the class indices; images are numbered from 1 by name. An image without a
    label file has no boxes.

    Raises:
        DataError: data.yaml is missing or damaged, or the split names no images.
    """
    file, options = _load_yaml(place)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": _categories(options, file),
    }
    images = _images(options, file, split)
    root = Path(os.path.commonpath([image.parent for image in images]))
    unreadable: list[tuple[str, str]] = []
    named = sorted((image.relative_to(root).as_posix(), image) for image in images)
    for number, (name, image) in enumerate(named, 1):
        labels = _label_file(image)
        boxes, wrong = _read_labels(labels, boxes_first="kpt_shape" in options)
        unreadable += wrong
        entry = {"id": number, "file_name": name}
        header = read_header(image)
        if header is None:
            content["images"].append(entry)
            unreadable += [(str(labels), "its image cannot be read")] if boxes else []
            continue
        # Of the upright image, so that it is turned.
        height, width = header[0][::-1] if header[1] in TURNED else header[0]
        content["images"].append({**entry, "height": height, "width": width})
        for category, box in boxes:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    **_in_pixels(box, (height, width), *header),
                    "iscrowd": 0,
                }
            )
    findings = {"unreadable_annotation": unreadable, "label_without_image": _orphans(images)}
    if not any(os.path.isfile(_label_file(image)) for image in images):
        findings["odd_layout"] = [
            (place.name, f"no label files; the first would be {_label_file(min(images))}")
        ]
    return Source(content, root, place, findings)


def _load_yaml(place: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return data.yaml and its content; `place` is the file or its folder."""
    file = place
    if place.is_dir():
        there = sorted([*place.glob("*.yaml"), *place.glob("*.yml")])
        usual = [path for path in there if path.stem == "data"]
        if not usual and len(there) != 1:
            names = ", ".join(path.name for path in there)
            raise DataError(
                f"{place}: which file describes the data, {names}? Set `data_path` to it."
                if there
                else f"{place}: there is no data.yaml. Check `data_path`."
            )
        file = [*usual, *there][0]
    try:
        content = read_yaml(file)
    except OSError as error:
        raise DataError(
            f"{file}: not a YOLO folder or its data.yaml ({error.strerror}). Check `data_path`."
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{file}:{line}: not YAML: {error.problem}. Fix the file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold `names`, `train` and `val`, not {brief(content)}.")
    return file, content


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


def _images(options: Mapping[str, Any], file: Path, split: str) -> list[Path]:
    """Return the images of a split, from folders (with all in them) and lists of names."""
    entries = options.get(split)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries) or not entries:
        known = ", ".join(k for k in ("train", "val", "test") if options.get(k)) or "none"
        raise DataError(
            f"{file}: `{split}` must name a folder or a list of images, not {brief(entries)}. "
            f"Splits there: {known}. Choose with `train_split` and `val_split`."
        )
    here = Path(os.path.abspath(file.parent))
    base = here / str(options.get("path") or "")
    base = base if os.path.isdir(base) else here  # `path` of another machine
    found: dict[Path, None] = {}
    for entry in entries:
        if not os.path.exists(base / entry):
            entry = entry.replace("\\", "/")  # as written on Windows
        path = Path(os.path.normpath(base / entry))
        # exports for another layout write ../
        if not os.path.exists(path) and entry.startswith("../"):
            path = Path(os.path.normpath(base / entry[3:]))
        if os.path.isdir(path):
            found.update(dict.fromkeys(sorted(p for p in path.rglob("*") if is_image(p))))
        elif os.path.isfile(path):
            found.update(dict.fromkeys(_listed(path, base)))
        else:
            raise DataError(
                f"{file}: `{split}` names '{entry:.200}', which is not under {base}. Fix the path."
            )
    if not found:
        raise DataError(f"{file}: there are no images under `{split}` ({entries[0]}).")
    return list(found)


def _listed(path: Path, base: Path) -> list[Path]:
    """Return the images of a text file; ./ is the file's folder, else names are under `base`."""
    names = [line.replace("\\", "/") for line in read_list(path)]
    folders = [path.parent if name.startswith("./") else base for name in names]
    return [Path(os.path.normpath(f / name)) for f, name in zip(folders, names, strict=True)]


def _label_file(image: Path) -> Path:
    """Return labels/ for the last images/ of a path; without one, the file next to the image."""
    file = image.with_suffix(".txt")
    before, found, after = file.as_posix().rpartition("/images/")
    return Path(f"{before}/labels/{after}") if found else file


def _orphans(images: list[Path]) -> list[tuple[str, str]]:
    """Return the label files next to those of the images that have boxes but no image."""
    stems: dict[tuple[Path, Path], set[str]] = defaultdict(set)
    for image in images:
        stems[_label_file(image).parent, image.parent].add(image.stem)
    orphans = []
    for (labels, folder), known in sorted(stems.items()):
        # images of other splits, or of a kind that is not searched for
        known |= {p.stem for p in folder.glob("*") if p.suffix != ".txt" and p.is_file()}
        for file in sorted(p for p in labels.glob("*.txt") if p.stem not in known):
            boxes, others = _read_labels(file, boxes_first=True)
            if boxes and not others:  # otherwise a list of names or classes
                orphans.append((str(file), ""))
    return orphans


def _read_labels(
    path: Path, *, boxes_first: bool
) -> tuple[list[tuple[int, list[float]]], list[tuple[str, str]]]:
    """Return (class, cxcywh) of each line that has them, and what is wrong with the others."""
    try:
        lines = read_regular(path, LARGEST_LIST).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError) as error:
        return [], [(f"{path}:1", str(error))]
    boxes, wrong = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                boxes.append(_parse_line(line, boxes_first=boxes_first))
        except (ValueError, OverflowError) as error:
            wrong.append((f"{path}:{number}", str(error)))
    return boxes, wrong


def _parse_line(line: str, *, boxes_first: bool) -> tuple[int, list[float]]:
    """Return a line's class and box, cxcywh as fractions.

    Raises:
        ValueError: it has neither four numbers nor corners after the class.
    """
    label, *values = (float(word) for word in line.split())
    if label != int(label):
        raise ValueError(f"class index {label} is not a whole number")
    if len(values) == 4 or (boxes_first and len(values) > 4):
        return int(label), values[:4]
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers after the class are neither a box nor corners")
    xs, ys = values[::2], values[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return int(label), [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


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


def write_yolo(splits: Sequence[Split], output_dir: Path, placer: Placer) -> list[list[str]]:
    """Write splits; classes are numbered from 0 in order of id, and crowds are left out.

    Raises:
        DataError: the splits have different classes, which YOLO numbers once for all.
    """
    if len({(split.ids, split.class_names) for split in splits}) > 1:
        raise DataError(
            f"{output_dir}: the splits have different classes, but YOLO numbers them once for all. "
            "Convert each split alone."
        )
    make_output_dir(output_dir)
    notices = [_write_labels(split, output_dir, placer) for split in splits]
    content: dict[str, Any] = {split.name: f"images/{split.name}" for split in splits}
    content["names"] = dict(enumerate(splits[0].class_names))
    write_atomic(
        output_dir / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )
    return notices


def _write_labels(split: Split, output_dir: Path, placer: Placer) -> list[str]:
    """Write the images and label files of a split; return a line on all that is lost."""
    crowds = outside = cut = 0
    unusable = []
    images, labels = output_dir / "images" / split.name, output_dir / "labels" / split.name
    for image in split.images:
        header = read_header(image.file)
        if header is None:
            unusable.append(repr(image.name))
            continue
        name = placer.free(image.name, images, split.name)
        placer.put(image, images / name)
        lines = []
        for label, box, crowd in zip(image.labels, image.xywh, image.crowd, strict=True):
            whole = _fractions(box, image.size, *header)
            values = _within(whole)
            if crowd:
                crowds += 1
            elif values is None:
                outside += 1
            else:
                cut += values != whole
                lines.append(f"{label} {' '.join(map(as_text, values))}\n")
        write_text((labels / name).with_suffix(".txt"), "".join(lines))
    lost = {
        "crowd boxes, which YOLO cannot represent, left out": crowds,
        "boxes outside their image, left out": outside,
        "boxes that extend past their image, clipped": cut,
    }
    notices = [f"{what}: {number}" for what, number in lost.items() if number]
    if unusable:
        notices.append(f"unreadable images, left out: {len(unusable)} ({first_few(unusable)})")
    return notices


def _fractions(
    box: list[float], counted: tuple[int, int], stored: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """Return centre and size as fractions of the upright image.

    The box is of that image if its size is the one that counts, else of the stored pixels.
    """
    turned = orientation in TURNED
    upright = turned and counted == stored[::-1] != stored
    height, width = counted if upright else stored
    x, y, w, h = box
    cx, cy, w, h = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
    if upright:
        return cx, cy, w, h
    return (*upright_point(cx, cy, orientation), *((h, w) if turned else (w, h)))


def _within(
    fractions: tuple[float, float, float, float],
) -> tuple[float, float, float, float] | None:
    """Return centre and size of what lies in the image, None for nothing.

    Other tools refuse more; what is past the edge by rounding alone is left as it is.
    """
    sides = [(c - s / 2, c + s / 2) for c, s in zip(fractions[:2], fractions[2:], strict=True)]
    if all(low > -1e-7 and high < 1 + 1e-7 for low, high in sides):
        return fractions
    (x0, x1), (y0, y1) = ((max(0.0, low), min(1.0, high)) for low, high in sides)
    return ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0) if x1 > x0 and y1 > y0 else None


FORMATS.register("yolo")(Format(read_yolo, write_yolo))
