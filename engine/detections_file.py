"""Read detections from a file in the COCO results format."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from engine.coco_evaluator import Found
from util.errors import DataError

_KEYS = ("image_id", "category_id", "bbox", "score")


def read_detections(
    path: Path, image_ids: Collection[int], category_ids: Collection[int]
) -> tuple[Found, list[str]]:
    """Read a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`.

    Returns the detections, and a notice if some are of categories that the data lack: those are
    left out.

    Raises:
        DataError: there is no such file, it is not such a list, or it names other pictures.
    """
    entries = _load(path)
    for number, entry in enumerate(entries):
        if fault := _fault(entry):
            raise DataError(
                f"{path}: entry {number}: expected {fault}, got {str(entry)[:80]}. "
                "Give a file in the COCO results format, such as eval/detections.json."
            )
    image = np.array([e["image_id"] for e in entries], dtype=np.int64)
    category = np.array([e["category_id"] for e in entries], dtype=np.int64)
    strange = ~np.isin(image, np.array(sorted(image_ids), dtype=np.int64))
    if strange.any():
        raise DataError(
            f"{path}: expected image ids of the data, got {image[strange][0]} and "
            f"{len(np.unique(image[strange])) - 1} others that it lacks. Give the annotations of "
            "the pictures that the detections were made on."
        )
    known = np.isin(category, np.array(sorted(category_ids), dtype=np.int64))
    notices = []
    if not known.all():
        lacking = ", ".join(map(str, np.unique(category[~known])[:5]))
        notices.append(
            f"detections of categories that the data lack: {int((~known).sum())} of "
            f"{len(entries)} (ids {lacking}), left out"
        )
    box = np.array([e["bbox"] for e in entries], dtype=np.float64).reshape(-1, 4)
    score = np.array([e["score"] for e in entries], dtype=np.float64)
    return Found(np.unique(image), image[known], category[known], box[known], score[known]), notices


def _load(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: expected a file of detections, got {error.strerror}. Check --detections."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {error}. Write the file again.") from None
    if not isinstance(entries, list):
        raise DataError(
            f"{path}: expected a list of detections, got {type(entries).__name__}. Give a file in "
            "the COCO results format, such as eval/detections.json."
        )
    return entries


def _fault(entry: Any) -> str | None:
    """Return what an entry should be and is not."""
    if not isinstance(entry, dict) or not all(key in entry for key in _KEYS):
        return f"an object with {', '.join(_KEYS)}"
    for key in ("image_id", "category_id"):
        whole = isinstance(entry[key], int) and not isinstance(entry[key], bool)
        if not whole or abs(entry[key]) >= 2**63:
            return f"a whole number as {key}"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "four finite numbers as bbox"
    if box[2] < 0 or box[3] < 0:
        return "bbox as [x, y, width, height]"
    return None if _is_number(entry["score"]) else "a finite number as score"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
