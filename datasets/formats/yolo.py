"""Read YOLO data: data.yaml, and beside the images in images/ a text file each in labels/.

A line is a class index, then the centre, width and height of a box as fractions of the image's
width and height, or the corners of a polygon, which becomes the box around it. With `kpt_shape` in
data.yaml key points follow the box and are passed over. Fractions are of the upright image, after
its EXIF orientation, as the tools that write this format have it. Where that leaves the size as it
is (mirrored, upside down or square), boxes are put on the stored pixels, which training then uses.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from datasets.checks.findings import Finding, at_places
from datasets.images import TURNED, is_image, read_header, stored_point
from util.errors import DataError

_DIGITS = 6  # of a pixel; hides the rounding of a fraction written in decimal


def read_yolo(place: Path, split: str) -> tuple[dict[str, Any], Path, list[Finding]]:
    """Return the content of a split as a COCO-format file, the image folder and findings.

    Category ids are the class indices; images are numbered from 1 by name. An image without a
    label file has no boxes.

    Raises:
        DataError: data.yaml is missing or damaged, or the split names no images.
    """
    file, options = _load_yaml(place)
    categories = _categories(options, file)
    images = _images(options, file, split)
    root = Path(os.path.commonpath([image.parent for image in images]))
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    malformed: list[str] = []
    unplaced: list[str] = []
    named = sorted((image.relative_to(root).as_posix(), image) for image in images)
    for number, (name, image) in enumerate(named, 1):
        header = read_header(image)
        size = None if header is None else _counted_size(*header)
        entry = {"id": number, "file_name": name}
        content["images"].append(
            entry if size is None else {**entry, "height": size[0], "width": size[1]}
        )
        labels = _label_file(image)
        boxes, wrong = _read_labels(labels, boxes_first="kpt_shape" in options)
        malformed += wrong
        if header is None or size is None:
            unplaced += [str(labels)] if boxes else []
            continue
        for category, box in boxes:
            entry = {"id": len(content["annotations"]) + 1, "image_id": number}
            placed = _in_pixels(box, size, *header)
            content["annotations"].append(
                {**entry, "category_id": category, **placed, "iscrowd": 0}
            )
    findings = [
        *at_places("malformed_line", "label lines that are not a box, left out", malformed),
        *at_places(
            "size_unknown", "labels of images that cannot be read, boxes left out", unplaced
        ),
        *_unmatched(images),
    ]
    return content, root, findings


def _unmatched(images: list[Path]) -> list[Finding]:
    """Return the findings of label files without an image, and of a split without label files."""
    orphans = _orphans(images)
    found = at_places("label_without_image", "label files whose image is not there", orphans)
    if any(os.path.isfile(_label_file(image)) for image in images):
        return found
    first = _label_file(min(images))
    line = f"no label file for any of {len(images)} images (the first would be {first})"
    return [*found, Finding("no_label_file", len(images), line)]


def _load_yaml(place: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return data.yaml and its content; `place` is the file or its folder."""
    file = place
    if place.is_dir():
        usual = [place / "data.yaml", place / "data.yml"]
        others = sorted([*place.glob("*.yaml"), *place.glob("*.yml")])
        there = [path for path in usual if path.is_file()] or others
        if len(there) != 1 and there[:1] != usual[:1]:
            raise DataError(
                f"{place}: expected data.yaml, found "
                f"{', '.join(path.name for path in there) or 'none'}. Name the file: --data_path."
            )
        file = there[0]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{file}: expected a YOLO folder or its data.yaml ({error.strerror}). "
            "Check --data_path."
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{file}:{line}: expected YAML, got {error.problem}. Mend it.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected `names`, `train` and `val`, got {content!r:.50}.")
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
            f"{file}: expected `names`, a list or index: name pairs, got {names!r:.50}. "
            "Name the classes."
        )
    return [{"id": int(i), "name": str(name)} for i, name in sorted(numbered.items())]


def _images(options: Mapping[str, Any], file: Path, split: str) -> list[Path]:
    """Return the images of a split, from folders (searched throughout) and lists of names."""
    entries = options.get(split)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries) or not entries:
        known = ", ".join(k for k in ("train", "val", "test") if options.get(k)) or "none"
        raise DataError(
            f"{file}: expected `{split}` to name a folder or a list of images, got {entries!r}. "
            f"Splits there: {known}. Choose with --train_split and --val_split."
        )
    here = Path(os.path.abspath(file.parent))
    base = here / str(options.get("path") or "")
    base = base if os.path.isdir(base) else here  # `path` of another machine
    found: dict[Path, None] = {}
    for entry in entries:
        if not os.path.exists(base / entry):
            entry = entry.replace("\\", "/")  # as written on Windows
        path = Path(os.path.normpath(base / entry))
        # exports for another layout say ../
        if not os.path.exists(path) and entry.startswith("../"):
            path = Path(os.path.normpath(base / entry[3:]))
        if os.path.isdir(path):
            found.update(dict.fromkeys(sorted(p for p in path.rglob("*") if is_image(p))))
        elif os.path.isfile(path):
            found.update(dict.fromkeys(_listed(path, base)))
        else:
            raise DataError(
                f"{file}: `{split}` names '{entry:.200}', which is not under {base}. Mend it."
            )
    if not found:
        raise DataError(f"{file}: expected images under `{split}` ({entries[0]}), found none.")
    return list(found)


def _listed(path: Path, base: Path) -> list[Path]:
    """Return the images of a text file; ./ is the file's folder, else names are under `base`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a list in UTF-8, got {error.reason}.") from error
    names = [line.strip().replace("\\", "/") for line in lines if line.strip()]
    folders = (path.parent if name.startswith("./") else base for name in names)
    return [Path(os.path.normpath(f / name)) for f, name in zip(folders, names, strict=True)]


def _label_file(image: Path) -> Path:
    """Return labels/ for the last images/ of a path; without one, the file beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def _orphans(images: list[Path]) -> list[str]:
    """Return the files with boxes, beside those of the images, of which there is no image."""
    stems: dict[tuple[Path, Path], set[str]] = defaultdict(set)
    for image in images:
        stems[_label_file(image).parent, image.parent].add(image.stem)
    orphans = []
    for (labels, folder), known in sorted(stems.items()):
        # of other splits, or of a kind that is not searched for
        known |= {p.stem for p in folder.glob("*") if p.suffix != ".txt" and p.is_file()}
        for file in sorted(labels.glob("*.txt")):
            if file.stem in known:
                continue
            boxes, others = _read_labels(file, boxes_first=True)
            if boxes and not others:  # else a list of names or classes
                orphans.append(str(file))
    return orphans


def _read_labels(
    path: Path, *, boxes_first: bool
) -> tuple[list[tuple[int, list[float]]], list[str]]:
    """Return (class, cxcywh) of each line that has them, and where and why others have not."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError) as error:
        return [], [f"{path}:1: {error}"]
    boxes, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            boxes.append(_parse_line(line, boxes_first=boxes_first))
        except (ValueError, OverflowError) as error:
            wrong.append(f"{path}:{number}: {error}")
    return boxes, wrong


def _parse_line(line: str, *, boxes_first: bool) -> tuple[int, list[float]]:
    """Return a line's class and box, cxcywh as fractions.

    Raises:
        ValueError: it has neither four numbers nor corners after the class.
    """
    label, *values = (float(word) for word in line.split())
    if label != int(label):
        raise ValueError(f"expected a whole class index, got {label}")
    if len(values) == 4 or (boxes_first and len(values) > 4):
        return int(label), values[:4]
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"expected 4 numbers or corners after the class, got {len(values)}")
    xs, ys = values[::2], values[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return int(label), [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _counted_size(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the (height, width) to state: that of the upright image, by which it is turned."""
    return stored[::-1] if orientation in TURNED else stored


def _in_pixels(
    box: list[float], size: tuple[int, int], stored: tuple[int, int], orientation: int
) -> dict[str, Any]:
    """Return `bbox` and `area` in pixels of the (height, width) that is stated.

    Where that is the size of the stored pixels, they will be used: the box is put on them.
    """
    cx, cy, w, h = box
    if size == stored:
        cx, cy = stored_point(cx, cy, orientation)
        w, h = (h, w) if orientation in TURNED else (w, h)
    height, width = size
    left, top = (cx - w / 2) * width, (cy - h / 2) * height
    xywh = [round(v, _DIGITS) for v in (left, top, w * width, h * height)]
    return {"bbox": xywh, "area": xywh[2] * xywh[3]}
