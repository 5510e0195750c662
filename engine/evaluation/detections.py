"""Read detections from a file in the COCO results format."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.evaluator import Found
from util.errors import DataError

_KEYS = ("image_id", "category_id", "bbox", "score")


def read_detections(
    path: Path, images: Mapping[int, Mapping[str, Any]], category_ids: Collection[int]
) -> tuple[Found, list[str]]:
    """Read a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`.

    `images` are the data's by id, with `width` and `height` in pixels where those are known.
    Returns the detections, and notices: of categories that the data lack, which are left out, and
    of boxes that seem to mean something else.

    Raises:
        DataError: there is no such file, it is not such a list, its boxes are fractions, or it
            names other images.
    """
    entries = _load(path)
    for number, entry in enumerate(entries):
        if fault := _fault(entry):
            raise DataError(
                f"{path}: entry {number}: expected {fault}, got {entry!r:.80}. "
                "Give a file in the COCO results format, such as eval/detections.json."
            )
    image = np.array([e["image_id"] for e in entries], dtype=np.int64)
    category = np.array([e["category_id"] for e in entries], dtype=np.int64)
    strange = ~np.isin(image, np.array(sorted(images), dtype=np.int64))
    if strange.any():
        raise DataError(
            f"{path}: expected image ids of the data, got {len(np.unique(image[strange]))} that it "
            f"lacks, such as {image[strange][0]}. Give the annotations of the images that the "
            "detections were made on."
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
    found = Found(np.unique(image), image[known], category[known], box[known], score[known])
    if found.box.size and found.box.max() <= 1 and (found.box % 1).any():
        raise DataError(
            f"{path}: expected boxes as x, y, width, height in pixels, got values from 0 to 1. "
            "Multiply them by the image's width and height."
        )
    return found, notices + _far_outside(found, images)


def _far_outside(found: Found, images: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return a notice if so many boxes leave their images that they must mean something else."""
    sides = [(images[i].get("width", 0), images[i].get("height", 0)) for i in found.images.tolist()]
    size = np.array(sides, dtype=np.int64).reshape(-1, 2)
    size = size[np.searchsorted(found.images, found.image)]
    end = found.box[:, :2] + found.box[:, 2:]
    outside = (size > 0).all(axis=1) & (end > 1.1 * size).any(axis=1)
    if 4 * outside.sum() <= len(found.score):
        return []
    return [
        f"boxes that reach far beyond their images: {outside.sum()} of {len(found.score)}; "
        "x, y, width, height in pixels of the image are expected, not corners or another size"
    ]


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
        # other programs write 42.0 too; a boolean is an int to Python
        if not _is_number(entry[key], 2**63) or entry[key] % 1:
            return f"a whole number as {key}"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "four finite numbers as bbox"
    if box[2] < 0 or box[3] < 0:
        return "bbox as [x, y, width, height]"
    return None if _is_number(entry["score"]) else "a finite number as score"


def _is_number(value: Any, limit: float = 1e9) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < limit
