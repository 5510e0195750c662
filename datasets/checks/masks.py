"""The smallest box around a mask, as COCO's tools compute it."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from datasets.checks.values import is_number, is_whole, to_number

_LARGEST = 65_500  # pixels of a side: more than any image has
_FIRST, _LAST = 48, 111  # characters of run lengths
_CONTINUES = 0x20  # in a character: the number has more of them


def box_around(segmentation: Any) -> list[float] | None:
    """Return the box (x, y, w, h; pixels) of polygons or of an RLE, None where there is none."""
    box = (
        _around_runs(segmentation)
        if isinstance(segmentation, Mapping)
        else _around_polygons(segmentation)
    )
    sound = box is not None and all(map(is_number, box)) and box[2] > 0 and box[3] > 0
    return box if sound else None


def _around_polygons(polygons: Any) -> list[float] | None:
    """Take a list of polygons [x, y, x, y, ...], one such polygon, or one of points [x, y]."""
    if not isinstance(polygons, Sequence) or isinstance(polygons, str) or not polygons:
        return None
    parts = polygons if all(isinstance(part, list) for part in polygons) else [polygons]
    parts = [part for part in parts if part]
    is_points = all(len(part) == 2 for part in parts)
    if not is_points and any(len(part) < 6 or len(part) % 2 for part in parts):
        return None
    values = [to_number(v) if isinstance(v, str) else v for v in chain.from_iterable(parts)]
    if not values or not all(map(is_number, values)):
        return None
    points = np.array(values, dtype=np.float64).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def _around_runs(mask: Mapping[str, Any]) -> list[float] | None:
    """Check all that pycocotools takes on trust: it would read past the end of what it got."""
    from pycocotools import mask as rle

    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(map(is_whole, size)):
        return None
    height, width = map(int, size)
    if not (1 <= height <= _LARGEST and 1 <= width <= _LARGEST and height * width < 2**32):
        return None
    if isinstance(counts, list):
        if not all(is_whole(n) and n >= 0 for n in counts) or sum(counts) != height * width:
            return None
        runs = rle.frPyObjects(
            {"size": [height, width], "counts": list(map(int, counts))}, height, width
        )
    elif isinstance(counts, str) and counts and counts.isascii():
        data = counts.encode()
        if not all(_FIRST <= c <= _LAST for c in data) or (data[-1] - _FIRST) & _CONTINUES:
            return None
        runs = {"size": [height, width], "counts": data}
    else:
        return None
    x, y, w, h = (float(value) for value in rle.toBbox(runs))
    return [x, y, w, h] if x + w <= width and y + h <= height else None
