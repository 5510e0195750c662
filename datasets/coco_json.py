"""Read and check the content of a COCO-format JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from util.classes import Classes
from util.errors import DataError

_NAMED = 3  # examples in a notice

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Images:
    """Pictures in the file's order. Shape: ids [N]; sizes [N,2] (height, width), 0 = not stated."""

    ids: IntArray
    file_names: list[str]
    sizes: IntArray


@dataclass(frozen=True)
class Annotations:
    """Boxes in the file's order.

    Shape: ids [A]; image [A], positions in `Images`; labels [A] in 0..K-1; xywh [A,4] in pixels,
    as in the file; area [A] in square pixels; crowd [A].
    """

    ids: IntArray
    image: IntArray
    labels: IntArray
    xywh: FloatArray
    area: FloatArray
    crowd: BoolArray

    def select(self, keep: BoolArray) -> "Annotations":
        """Return those where `keep` [A] is true."""
        return Annotations(*(getattr(self, f.name)[keep] for f in fields(self)))


@dataclass(frozen=True)
class CocoContent:
    """What a COCO-format file says, with unusable boxes left out and told in `notices`."""

    classes: Classes
    images: Images
    annotations: Annotations
    notices: list[str]


def read_coco_json(path: Path, *, need_boxes: bool) -> CocoContent:
    """Read a COCO-format JSON file; without `need_boxes`, `annotations` may be missing.

    Raises:
        DataError: the file is missing or is not JSON, a section is missing or empty, ids repeat,
            an annotation names an image or a category that does not exist, or boxes are fractions.
    """
    content = load_json(path)
    required = ["images", "categories", *(["annotations"] if need_boxes else [])]
    for key in required:
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: expected a list `{key}`, found none. "
                "Give a COCO-format file of object instances."
            )
    categories = _with_ids(content["categories"], "category", path)
    images = _with_ids(content["images"], "image", path)
    for key, found in (("categories", categories), ("images", images)):
        if not found:
            raise DataError(f"{path}: expected at least one entry in `{key}`, got none.")
    entries = content.get("annotations") or []
    notices: list[str] = []
    odd = next((i for i, entry in enumerate(entries) if not isinstance(entry, Mapping)), None)
    if odd is not None:
        raise DataError(f"{path}: annotation at position {odd}: expected an object, got a value.")
    if any("id" not in entry for entry in entries):
        entries = [{**entry, "id": number} for number, entry in enumerate(entries, 1)]
        notices.append("annotations without an id: all were numbered in the file's order")
    _with_ids(entries, "annotation", path)
    filled = {
        "area": sum(not _is_area(entry.get("area")) for entry in entries),
        "iscrowd": sum(entry.get("iscrowd") not in (0, 1) for entry in entries),
    }
    if any(filled.values()):
        counts = ", ".join(f"{key} of {count}" for key, count in filled.items() if count)
        notices.append(
            f"annotations without a valid {counts}: filled in (width x height; not a crowd)"
        )
    classes = Classes.from_categories(categories)
    read = _read_images(images, path)
    annotations = _read_annotations(entries, read, classes, path)
    annotations = _drop_unusable(annotations, read, notices)
    _refuse_fractions(annotations, path)
    return CocoContent(classes, read, annotations, notices)


def name_boxes(kind: str, annotations: Annotations, images: Images, chosen: BoolArray) -> str:
    """Say how many boxes are `chosen` [A] and which the first are; `kind` says what they are."""
    first = [
        f"annotation {annotations.ids[i]} of image {images.ids[annotations.image[i]]} "
        f"'{images.file_names[annotations.image[i]]}'"
        for i in np.flatnonzero(chosen)[:_NAMED]
    ]
    count = int(chosen.sum())
    more = ", ..." if count > _NAMED else ""
    return f"{kind}: {count} box{'es' if count > 1 else ''} ({', '.join(first)}{more})"


def load_json(path: Path) -> dict[str, Any]:
    """Return the content of a COCO-format file, unchecked but for being a JSON object.

    Raises:
        DataError: there is no such file, or it is not JSON.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a COCO-format JSON file, found none. Check the path.")
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: expected JSON, got {error.msg} at line {error.lineno} column {error.colno}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected JSON in UTF-8, got {error.reason}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(content).__name__}.")
    return content


def _with_ids(entries: Sequence[Any], kind: str, path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the entries once each is known to be a mapping with a whole-number id of its own."""
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if number is None or not _is_whole(number):
            raise DataError(
                f"{path}: {kind} at position {position}: expected an integer `id`, got {number!r}."
            )
        if number in seen:
            raise DataError(f"{path}: {kind} id {number} occurs twice. Ids must be unique.")
        seen.add(number)
    return entries


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _read_images(entries: Sequence[Mapping[str, Any]], path: Path) -> Images:
    sizes = np.zeros((len(entries), 2), dtype=np.int64)
    for i, entry in enumerate(entries):
        if not isinstance(entry.get("file_name"), str):
            raise DataError(f"{path}: image {entry['id']}: expected a `file_name`, found none.")
        height, width = entry.get("height"), entry.get("width")
        if _is_side(height) and _is_side(width):
            sizes[i] = height, width
    ids = np.array([entry["id"] for entry in entries], dtype=np.int64)
    return Images(ids, [entry["file_name"] for entry in entries], sizes)


def _read_annotations(
    entries: Sequence[Mapping[str, Any]], images: Images, classes: Classes, path: Path
) -> Annotations:
    """Fill the arrays; a box that is not four numbers becomes NaN."""
    position = {int(image_id): i for i, image_id in enumerate(images.ids)}
    count = len(entries)
    image, label = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    xywh, area = np.empty((count, 4)), np.empty(count)
    for i, entry in enumerate(entries):
        image[i] = _look_up(position, entry, "image_id", "images", path)
        label[i] = _look_up(classes.label_of, entry, "category_id", "categories", path)
        box = entry.get("bbox")
        xywh[i] = box if _four_numbers(box) else np.nan
        area[i] = entry["area"] if _is_area(entry.get("area")) else np.nan
    return Annotations(
        np.array([entry["id"] for entry in entries], dtype=np.int64),
        image,
        label,
        xywh,
        np.where(np.isfinite(area), area, xywh[:, 2] * xywh[:, 3]),
        np.array([entry.get("iscrowd") == 1 for entry in entries], dtype=np.bool_),
    )


def _look_up(
    table: Mapping[int, int], entry: Mapping[str, Any], key: str, section: str, path: Path
) -> int:
    value: Any = entry.get(key)
    if not _is_whole(value) or value not in table:
        raise DataError(
            f"{path}: annotation {entry['id']}: expected a `{key}` listed in `{section}`, "
            f"got {value!r}. Mend or remove the annotation."
        )
    return table[value]


def _is_side(value: Any) -> TypeGuard[float]:
    return _is_number(value) and value >= 1


def _four_numbers(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)


def _is_area(value: object) -> bool:
    return isinstance(value, (int, float)) and _is_number(value) and value >= 0


def _is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number (NaN and Infinity fail the comparison)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _drop_unusable(annotations: Annotations, images: Images, notices: list[str]) -> Annotations:
    """Leave out boxes that no one can train on or evaluate."""
    broken = np.asarray(np.isnan(annotations.xywh).any(axis=1))
    flat = np.asarray((annotations.xywh[:, 2:] <= 0).any(axis=1))  # False for NaN
    for kind, chosen in (
        ("bbox is not four finite numbers, dropped", broken),
        ("bbox without width or height, dropped", flat),
    ):
        if chosen.any():
            notices.append(name_boxes(kind, annotations, images, chosen))
    return annotations.select(~(broken | flat))


def _refuse_fractions(annotations: Annotations, path: Path) -> None:
    xywh = annotations.xywh
    if xywh.size and xywh.max() <= 1 and (xywh % 1).any():
        raise DataError(
            f"{path}: expected boxes as x, y, width, height in pixels, got values from 0 to 1. "
            "Multiply them by the picture's width and height."
        )
