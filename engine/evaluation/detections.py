"""Read detections from a file in the COCO results format, as other programs write it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.evaluation.identify import CategoryIds, Key, find_categories, find_images
from engine.evaluation.matching import Bools, Detections, Floats, Truth
from util.errors import DataError
from util.files import no_text, read_regular

_LARGEST = 2**34  # bytes
_KEYS = ("image_id", "category_id", "bbox", "score")
_FORMAT = "Use a file in the COCO results format, such as eval/detections.json."


def read_detections(
    path: Path,
    truth: Truth,
    *,
    category_ids: CategoryIds = "auto",
    class_agnostic: bool = False,
) -> tuple[Detections, list[str]]:
    """Read a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`.

    Images may be named by their ids, or by names or stems of their files; categories by ids or
    names. A `file_name` or `category_name` beside an id that means another one counts, as `predict`
    writes them. With `class_agnostic`, all are of the first category.

    Returns the detections, and notices: of entries that cannot be read, and of images and
    categories that the data lack, which are skipped; of how images were named; and of boxes that
    seem to mean something else.

    Raises:
        DataError: there is no such file, it is not such a list, its boxes are fractions, most of
            its images are not in the data, or its category ids seem to be others.
    """
    rows, box, score, notices = _readable(_load(path), path)
    file_names = [row.file_name for row in rows]
    image, more = find_images([row.image for row in rows], file_names, truth, path)
    notices += more
    if class_agnostic:
        category = np.zeros(len(rows), dtype=np.int64)
    else:
        category, more = find_categories(
            [row.category for row in rows],
            [row.category_name for row in rows],
            truth,
            path,
            image=image,
            box=box,
            score=score,
            use=image >= 0,
            reading=category_ids,
        )
        notices += more
    detections = Detections(image=image, category=category, box=box, score=score).select(
        (image >= 0) & (category >= 0)
    )
    return detections, notices + _check_boxes(detections.box, _beyond(detections, truth), path)


def _check_boxes(box: Floats, outside: Bools, path: Path) -> list[str]:
    if box.size and box.max() <= 1 and (box % 1).any():
        raise DataError(
            f"{path}: all boxes are between 0 and 1, but x, y, width and height must be in pixels. "
            "Multiply them by the image's width and height."
        )
    if 4 * outside.sum() <= len(box):
        return []
    return [
        f"{outside.sum()} of {len(box)} boxes reach far beyond their images; they must be x, "
        "y, width, height in pixels of the image, not corners or pixels of another size"
    ]


def _beyond(detections: Detections, truth: Truth) -> Bools:
    """Return which boxes reach more than a tenth beyond their images."""
    box, size = detections.box, truth.sizes[detections.image][:, ::-1]
    inside = box[:, :2] + box[:, 2:] <= 1.1 * size
    return np.asarray((size > 0).all(axis=1) & ~inside.all(axis=1))


def _load(path: Path) -> list[Any]:
    try:
        data = read_regular(path, _LARGEST)
        if what := no_text(data):
            raise DataError(f"{path}: {what}.")
        entries = json.loads(data)
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the detections ({error.strerror}). Check the path."
        ) from None
    except (ValueError, RecursionError) as error:
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        hint = "A list of all is needed, not JSON lines" if lines else "Write the file again"
        raise DataError(f"{path}: not valid JSON ({error}). {hint}.") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: a list of detections is needed, not one object. {_FORMAT}")
    return entries


def _readable(entries: list[Any], path: Path) -> tuple[list["_Row"], Floats, Floats, list[str]]:
    """Return the entries that can be read, their boxes and scores, and a notice of the others.

    Raises:
        DataError: none can be read.
    """
    rows: list[_Row] = []
    faults: Counter[str] = Counter()
    first = ""
    for number, entry in enumerate(entries):
        row = _row(entry)
        if not isinstance(row, str):
            rows.append(row)
            continue
        faults[row] += 1
        first = first or f"entry {number}: {row}, in {entry!r:.80}"
    if faults and not rows:
        raise DataError(f"{path}: {first}. {_FORMAT}")
    notices = []
    if faults:
        kinds = "; ".join(f"{count} x {fault}" for fault, count in faults.most_common())
        notices.append(
            f"{faults.total()} of {len(entries)} entries skipped: {kinds}; the first is {first}"
        )
    box = np.array([row.box for row in rows], dtype=np.float64).reshape(-1, 4)
    score = np.array([row.score for row in rows], dtype=np.float64)
    return rows, box, score, notices


class _Row(NamedTuple):
    """An entry as it is written; names are "" where there are none."""

    image: Key
    category: Key
    file_name: str
    category_name: str
    box: list[float]
    score: float


def _row(entry: Any) -> _Row | str:
    """Return what an entry says, or what is wrong with it."""
    if not isinstance(entry, dict) or not all(key in entry for key in _KEYS):
        return f"not an object with {', '.join(_KEYS)}"
    keys: list[Key] = []
    for name in ("image_id", "category_id"):
        key = entry[name]
        if isinstance(key, str) and key.strip():
            keys.append(key)
        # other programs write 42.0 too; a boolean is an int to Python
        elif _number(key, 2**63) is None or isinstance(key, str) or key % 1:
            return f"{name} is neither a whole number nor a name"
        else:
            keys.append(int(key))
    box = entry["bbox"]
    corners = [_number(value) for value in box] if isinstance(box, list) else []
    sides = [value for value in corners if value is not None]
    if len(corners) != 4 or len(sides) != 4:
        return "bbox is not four finite numbers"
    if sides[2] < 0 or sides[3] < 0:
        return "bbox has a negative width or height; it must be [x, y, width, height]"
    score = _number(entry["score"])
    if score is None:
        return "score is not a finite number"
    names = (entry.get(key) for key in ("file_name", "category_name"))
    file_name, category_name = (name if isinstance(name, str) else "" for name in names)
    return _Row(keys[0], keys[1], file_name, category_name, sides, score)


def _number(value: Any, limit: float = 1e9) -> float | None:
    """Return a number, which may be written as text; None for anything else or beyond a limit."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < limit
    return value if usable else None
