"""Check the content of a COCO-format file and put it into flat arrays.

Whatever is wrong with one image or one box leaves that one out and is told; a file that is wrong
as a whole is refused.
"""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeGuard

import numpy as np

from datasets.arrays import Annotations, BoolArray, Images, IntArray, Names
from datasets.checks.findings import NAMED, Finding, at_places, first_few
from util.classes import Classes
from util.errors import DataError

Entry = Mapping[str, Any]

_IMAGE_FAULTS = {
    "no_file_name": "images without a file_name, left out",
    "outside_folder": "images whose file_name leads out of the image folder, left out",
    "repeated_image": "image ids that occur twice: the second left out, both if their files differ",
}


@dataclass(frozen=True, eq=False)
class CocoContent:
    """What a COCO-format file says, with unusable entries left out and told in `findings`."""

    classes: Classes
    images: Images
    annotations: Annotations
    findings: tuple[Finding, ...]


def load_json(path: Path) -> dict[str, Any]:
    """Return the content of a COCO-format file, unchecked but for being a JSON object.

    Raises:
        DataError: there is no such file, or it is not JSON.
    """
    return parse_json(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it is not there or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: expected a COCO-format JSON file, found none. Check the path."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a COCO-format JSON file: {error}.") from error


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that the bytes of a file at `path` hold.

    Raises:
        DataError: they are not JSON in UTF-8, or another value.
    """
    try:
        content = json.loads(data)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: expected JSON, got {error.msg} at line {error.lineno} column {error.colno}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected JSON in UTF-8, got {error.reason}.") from error
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise DataError(f"{path}: expected JSON of a data set: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(content).__name__}.")
    return content


def check_content(content: Mapping[str, Any], place: Path, *, need_boxes: bool) -> CocoContent:
    """Check the content of a COCO-format file; `place` is what to name in messages.

    Without `need_boxes`, `annotations` may be missing.

    Raises:
        DataError: a section is missing or has nothing usable, category ids are missing or repeat,
            or boxes are fractions.
    """
    required = ["images", "categories", *(["annotations"] if need_boxes else [])]
    for key in required:
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{place}: expected a list `{key}`, found none. "
                "Give a COCO-format file of object instances."
            )
        if not content[key] and key != "annotations":
            raise DataError(f"{place}: expected at least one entry in `{key}`, got none.")
    _check_categories(content["categories"], place)
    classes = Classes.from_categories(content["categories"])
    findings: list[Finding] = []
    images = _read_images(content["images"], findings)
    if not len(images.ids):
        raise DataError(
            f"{place}: expected at least one usable image in `images`, got none. "
            f"Noticed: {'; '.join(finding.text for finding in findings)}."
        )
    listed = content.get("annotations")
    entries = _usable_annotations(listed if isinstance(listed, list) else [], findings)
    annotations = _read_annotations(entries, images, classes, findings)
    annotations = _drop_unusable(annotations, images, findings)
    _refuse_fractions(annotations, place)
    return CocoContent(classes, images, annotations, tuple(findings))


def box_finding(
    kind: str, text: str, annotations: Annotations, images: Images, chosen: BoolArray
) -> list[Finding]:
    """Return the finding of the boxes `chosen` [A], none where none is; the first are named."""
    count = int(chosen.sum())
    if not count:
        return []
    first = [
        f"annotation {annotations.ids[i]} of image {images.ids[annotations.image[i]]} "
        f"{images.file_names[annotations.image[i]]!r}"
        for i in np.flatnonzero(chosen)[:NAMED]
    ]
    line = f"{text}: {count} box{'es' if count > 1 else ''} ({first_few(first, count)})"
    return [Finding(kind, count, line, "annotation", annotations.ids[chosen])]


def is_inside(file_name: str) -> bool:
    """Tell whether a name, joined to a folder, stays in it."""
    path = PurePath(file_name)
    return not (path.anchor or ".." in path.parts or "\0" in file_name)


def _check_categories(entries: Sequence[Any], place: Path) -> None:
    """Refuse categories without a whole number of their own: boxes could mean any class."""
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if not is_whole(number):
            raise DataError(
                f"{place}: category at position {position}: expected an integer `id`, "
                f"got {number!r:.40}."
            )
        if number in seen:
            raise DataError(f"{place}: category id {number} occurs twice. Ids must be unique.")
        seen.add(number)


def _read_images(entries: Sequence[Any], findings: list[Finding]) -> Images:
    used = _usable_images(entries, findings)
    sizes = np.zeros((len(used), 2), dtype=np.int64)
    for i, entry in enumerate(used):
        height, width = entry.get("height"), entry.get("width")
        if is_side(height) and is_side(width):
            sizes[i] = height, width
    ids = np.array([entry["id"] for entry in used], dtype=np.int64)
    return Images(ids, Names.of(entry["file_name"] for entry in used), sizes)


def _usable_images(entries: Sequence[Any], findings: list[Finding]) -> list[Entry]:
    """Return the images that have an id of their own and a name inside the folder."""
    kept: dict[int, Entry] = {}
    ambiguous: set[int] = set()
    faults: dict[str, list[tuple[int, str]]] = {fault: [] for fault in _IMAGE_FAULTS}
    unnumbered: list[str] = []
    for position, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if not is_whole(number):
            unnumbered.append(f"position {position}")
            continue
        name = entry.get("file_name")
        fault = image_fault(name, number, kept)
        if fault is None:
            kept[number] = entry
            continue
        faults[fault].append((number, repr(name) if name else f"id {number}"))
        if fault == "repeated_image" and kept[number]["file_name"] != name:
            ambiguous.add(number)
    findings += at_places("no_image_id", "images without an integer id, left out", unnumbered)
    for fault, found in faults.items():
        if found:
            names = first_few([name for _, name in found[:NAMED]], len(found))
            line = f"{_IMAGE_FAULTS[fault]}: {len(found)} ({names})"
            ids = np.array([number for number, _ in found], dtype=np.int64)
            findings.append(Finding(fault, len(found), line, "image", ids))
    return [entry for number, entry in kept.items() if number not in ambiguous]


def image_fault(name: object, number: int, kept: Container[int]) -> str | None:
    """Return why an image named so is left out, if it is; `kept` are the ids before it."""
    if not isinstance(name, str):
        return "no_file_name"
    if not is_inside(name):
        return "outside_folder"
    return "repeated_image" if number in kept else None


def _usable_annotations(entries: Sequence[Any], findings: list[Finding]) -> Sequence[Entry]:
    """Return the entries that are objects, each with an id; tell what else will be filled in."""
    odd = [f"position {i}" for i, entry in enumerate(entries) if not isinstance(entry, Mapping)]
    if odd:
        findings += at_places("not_an_object", "annotations that are not objects, left out", odd)
        entries = [entry for entry in entries if isinstance(entry, Mapping)]
    ids = {entry["id"] for entry in entries if is_whole(entry.get("id"))}
    if len(ids) < len(entries):
        count = len(entries) - len(ids)
        entries = [{**entry, "id": number} for number, entry in enumerate(entries, 1)]
        line = (
            f"annotations without an id of their own: {count}, "
            "all were numbered in the file's order"
        )
        findings.append(Finding("renumbered", count, line))
    lacking = {
        "area": np.array([not is_area(entry.get("area")) for entry in entries], dtype=np.bool_),
        "iscrowd": np.array([entry.get("iscrowd") not in (0, 1) for entry in entries], np.bool_),
    }
    counts = [f"{key} of {int(found.sum())}" for key, found in lacking.items() if found.any()]
    if counts:
        any_of = lacking["area"] | lacking["iscrowd"]
        numbers = np.array([entry["id"] for entry in entries], dtype=np.int64)[any_of]
        line = (
            f"annotations without a valid {', '.join(counts)}: "
            "filled in (width x height; not a crowd)"
        )
        findings.append(Finding("filled_in", len(numbers), line, "annotation", numbers))
    return entries


def _read_annotations(
    entries: Sequence[Entry], images: Images, classes: Classes, findings: list[Finding]
) -> Annotations:
    """Fill the arrays with what names an image and a class; a bad box becomes NaN."""
    position = {image_id: i for i, image_id in enumerate(images.ids.tolist())}
    image = _look_up(position, entries, "image_id")
    label = _look_up(classes.label_of, entries, "category_id")
    for key, found, section in (
        ("image_id", image, "images"),
        ("category_id", label, "categories"),
    ):
        unknown = np.flatnonzero(found < 0).tolist()
        if len(unknown):
            first = [f"annotation {entries[i]['id']}: {entries[i].get(key)!r:.40}"
                     for i in unknown[:NAMED]]  # fmt: skip
            line = (
                f"annotations whose {key} is not of usable {section}, left out: {len(unknown)} "
                f"({first_few(first, len(unknown))})"
            )
            ids = np.array([entries[i]["id"] for i in unknown], dtype=np.int64)
            findings.append(Finding(f"unknown_{key}", len(unknown), line, "annotation", ids))
    known = np.flatnonzero((image >= 0) & (label >= 0)).tolist()
    used = [entries[i] for i in known]
    xywh, area = np.empty((len(used), 4)), np.empty(len(used))
    for i, entry in enumerate(used):
        box = entry.get("bbox")
        xywh[i] = box if is_box(box) else np.nan
        area[i] = entry["area"] if is_area(entry.get("area")) else np.nan
    return Annotations(
        np.array([entry["id"] for entry in used], dtype=np.int64),
        image[known],
        label[known],
        xywh,
        np.where(np.isfinite(area), area, xywh[:, 2] * xywh[:, 3]),
        np.array([entry.get("iscrowd") == 1 for entry in used], dtype=np.bool_),
    )


def _look_up(table: Mapping[int, int], entries: Sequence[Entry], key: str) -> IntArray:
    """Return what the table has for `key` of each entry, -1 where it has nothing."""
    values = (entry.get(key) for entry in entries)
    found = (table.get(value, -1) if is_whole(value) else -1 for value in values)
    return np.fromiter(found, dtype=np.int64, count=len(entries))


def is_whole(value: Any) -> TypeGuard[int]:
    """Tell whether a JSON value is a whole number that fits 64 bits; 3.0 is, as tables write it."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and abs(value) < 2**63


def is_side(value: Any) -> TypeGuard[float]:
    """Tell whether a JSON value can be a width or a height."""
    return is_number(value) and value >= 1


def is_box(box: Any) -> bool:
    """Tell whether a JSON value is a list of four finite numbers."""
    return isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)


def is_area(value: object) -> TypeGuard[float]:
    """Tell whether a JSON value can be an area."""
    return isinstance(value, (int, float)) and is_number(value) and value >= 0


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number (NaN and Infinity fail the comparison)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _drop_unusable(
    annotations: Annotations, images: Images, findings: list[Finding]
) -> Annotations:
    """Leave out boxes that no one can train on or evaluate."""
    broken = np.asarray(np.isnan(annotations.xywh).any(axis=1))
    flat = np.asarray((annotations.xywh[:, 2:] <= 0).any(axis=1))  # False for NaN
    for kind, text, chosen in (
        ("broken_bbox", "bbox is not four finite numbers, dropped", broken),
        ("flat_bbox", "bbox without width or height, dropped", flat),
    ):
        findings += box_finding(kind, text, annotations, images, chosen)
    return annotations.select(~(broken | flat))


def _refuse_fractions(annotations: Annotations, place: Path) -> None:
    xywh = annotations.xywh
    if xywh.size and xywh.max() <= 1 and (xywh % 1).any():
        raise DataError(
            f"{place}: expected boxes as x, y, width, height in pixels, got values from 0 to 1. "
            "Multiply them by the image's width and height."
        )
