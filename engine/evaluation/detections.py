"""Read detections from a file in the COCO results format."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.matching import Detections, Truth
from util.errors import DataError
from util.files import read_regular

_LARGEST = 2**34  # bytes
_KEYS = ("image_id", "category_id", "bbox", "score")
_FORMAT = "Use a file in the COCO results format, such as eval/detections.json."


def read_detections(path: Path, truth: Truth) -> tuple[Detections, list[str]]:
    """Read a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`.

    Returns the detections, and notices: of categories that the data lack, which are skipped, and
    of boxes that seem to mean something else.

    Raises:
        DataError: there is no such file, it is not such a list, its boxes are fractions, or it
            names other images.
    """
    entries = _load(path)
    for number, entry in enumerate(entries):
        if fault := _fault(entry):
            raise DataError(f"{path}: entry {number}: {fault}, in {entry!r:.80}. {_FORMAT}")
    image_ids = np.array([e["image_id"] for e in entries], dtype=np.int64)
    category_ids = np.array([e["category_id"] for e in entries], dtype=np.int64)
    unknown = np.unique(image_ids[~np.isin(image_ids, truth.image_ids)])
    if len(unknown):
        raise DataError(
            f"{path}: {len(unknown)} image ids are not in the data, such as {unknown[0]}. Use the "
            "annotations of the images that the detections were made on."
        )
    known = np.isin(category_ids, truth.category_ids)
    notices = []
    if not known.all():
        notices.append(
            f"{int((~known).sum())} of {len(entries)} detections skipped: their categories (ids "
            f"{', '.join(map(str, np.unique(category_ids[~known])[:5]))}) are not in the data"
        )
    detections = Detections(
        image=np.searchsorted(truth.image_ids, image_ids),
        category=np.searchsorted(truth.category_ids, category_ids),
        box=np.array([e["bbox"] for e in entries], dtype=np.float64).reshape(-1, 4),
        score=np.array([e["score"] for e in entries], dtype=np.float64),
    ).select(known)
    box = detections.box
    if box.size and box.max() <= 1 and (box % 1).any():
        raise DataError(
            f"{path}: all boxes are between 0 and 1, but x, y, width and height must be in pixels. "
            "Multiply them by the image's width and height."
        )
    size = truth.sizes[detections.image][:, ::-1]
    outside = (size > 0).all(axis=1) & (box[:, :2] + box[:, 2:] > 1.1 * size).any(axis=1)
    if 4 * outside.sum() > len(box):
        notices.append(
            f"{outside.sum()} of {len(box)} boxes reach far beyond their images; they must be x, "
            "y, width, height in pixels of the image, not corners or pixels of another size"
        )
    return detections, notices


def _load(path: Path) -> list[Any]:
    try:
        entries = json.loads(read_regular(path, _LARGEST))
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the detections ({error.strerror}). Check the path."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Write the file again.") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: a list of detections is needed, not one object. {_FORMAT}")
    return entries


def _fault(entry: Any) -> str | None:
    """Return what is wrong with an entry."""
    if not isinstance(entry, dict) or not all(key in entry for key in _KEYS):
        return f"not an object with {', '.join(_KEYS)}"
    for key in ("image_id", "category_id"):
        # other programs write 42.0 too; a boolean is an int to Python
        if not _is_number(entry[key], 2**63) or entry[key] % 1:
            return f"{key} is not a whole number"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "bbox is not four finite numbers"
    if box[2] < 0 or box[3] < 0:
        return "bbox has a negative width or height; it must be [x, y, width, height]"
    return None if _is_number(entry["score"]) else "score is not a finite number"


def _is_number(value: Any, limit: float = 1e9) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < limit
