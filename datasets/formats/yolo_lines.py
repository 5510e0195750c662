"""Lines of YOLO label files: boxes, polygons, and boxes that are followed by points.

A class, then four numbers: a box. More numbers are the corners of a polygon, or a box and points
that belong to it, as of a face or of a number plate. Nothing in a file says which. A box holds its
points, and of many polygons hardly one does that by chance; all lines of one length are judged
together, as points are the same number everywhere.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.formats.registry import LARGEST_LIST
from datasets.formats.text import decode
from util.files import read_regular

_EDGE = 0.005  # of the image, by which rounding puts a box past it
_SLACK = 0.1  # of a box, by which its points may lie outside
_HABIT = 3  # lines that show that all of a length are boxes with points
_MOST, _FEW = 0.9, 0.5  # of them that a box and its points, or polygons, may be
_BEYOND = 1.5  # no fraction of an image


@dataclass(frozen=True, slots=True)
class Line:
    """A line of numbers: where it is, its class and what follows."""

    place: str
    label: int
    values: list[float]


@dataclass
class Lines:
    """What the lines of a split turned out to be: boxes, and what is wrong with the others.

    `boxes` has a class and cxcywh in fractions of the image for each line that could be read, by
    the position of the image. `counts` says how many lines were read as what.
    """

    boxes: dict[int, list[tuple[int, list[float]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    wrong: list[tuple[str, str]] = field(default_factory=list)
    pixels: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def read_lines(path: Path) -> tuple[list[Line], list[tuple[str, str]]]:
    """Return a file's lines that are numbers, and what is wrong with the others."""
    try:
        lines = decode(read_regular(path, LARGEST_LIST)).splitlines()
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError) as error:
        return [], [(f"{path}:1", str(error))]
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(_parse(line, f"{path}:{number}"))
        except (ValueError, OverflowError) as error:
            wrong.append((f"{path}:{number}", str(error)))
    return found, wrong


def _parse(line: str, place: str) -> Line:
    """Return a line's class and numbers.

    Raises:
        ValueError: it has neither four numbers nor more than five after the class.
    """
    label, *values = map(_number, line.split())
    if label != int(label):
        raise ValueError(f"class index {label} is not a whole number")
    if len(values) == 5 and 0 <= values[4] <= 1:
        raise ValueError("a fifth number after the class: a confidence? Remove it to use the box")
    if len(values) < 4 or len(values) == 5:
        raise ValueError(f"{len(values)} numbers after the class are neither a box nor corners")
    return Line(place, int(label), values)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{word!r:.60} is not a number") from None


def judge(found: Sequence[Sequence[Line]], *, points: int | None) -> Lines:
    """Return what the lines of each image [N] are; `points` numbers follow a box, if known."""
    result = Lines()
    long = [line for lines in found for line in lines if len(line.values) > 4]
    kinds = _judge_long(long) if points is None else [_pose(line, points) for line in long]
    kind_of_next = iter(kinds)
    for position, lines in enumerate(found):
        for line in lines:
            values, number = line.values, len(line.values)
            kind = "boxes" if number == 4 else next(kind_of_next)
            if kind in _WRONG:
                result.wrong.append((line.place, _WRONG[kind].format(number, points)))
                continue
            if kind == "pixels" or values[2] > _BEYOND or values[3] > _BEYOND:
                result.pixels.append((line.place, f"{values[:4]}, more than the whole image"))
                continue
            result.counts[kind] += 1
            box = around(values) if kind == "polygons" else values[:4]
            result.boxes[position].append((line.label, box))
    return result


def _pose(line: Line, points: int) -> str:
    return "poses" if len(line.values) == 4 + points else "other"


_WRONG = {
    "other": "{} numbers after the class are not the 4 of a box and {} of `kpt_shape`",
    "neither": "{} numbers after the class are neither a polygon nor a box that holds its points",
    "unclear": "{} numbers after the class may be a polygon or a box and points: set `kpt_shape` "
    "in data.yaml if they are points",
}


def _judge_long(lines: Sequence[Line]) -> list[str]:
    """Return what each line [L] of more than four numbers is."""
    possible = [(holds_points(line.values), is_polygon(line.values)) for line in lines]
    by_length: dict[int, list[tuple[bool, bool]]] = defaultdict(list)
    for line, both in zip(lines, possible, strict=True):
        by_length[len(line.values)].append(both)
    overall = _share(possible)
    kinds = {number: _judge_length(group, overall) for number, group in by_length.items()}
    return [
        _judge_line(line.values, kinds[len(line.values)], *both)
        for line, both in zip(lines, possible, strict=True)
    ]


def _judge_length(group: Sequence[tuple[bool, bool]], overall: float) -> str:
    """Return what lines of one length are where both is possible."""
    share, sure = _share(group), any(box and not polygon for box, polygon in group)
    if share >= _MOST and (len(group) >= _HABIT or sure):
        return "boxes with points"
    return "polygons" if share <= _FEW or (overall <= _FEW and not sure) else "unclear"


def _share(group: Sequence[tuple[bool, bool]]) -> float:
    """Return which part of the lines that can be read hold their points."""
    readable = [box for box, polygon in group if box or polygon]
    return sum(readable) / max(1, len(readable))


def _judge_line(values: list[float], kind: str, box: bool, polygon: bool) -> str:
    """Return what a line is, of a length whose lines are of a kind, by what it can be."""
    if not box and not polygon:
        return "pixels" if _in_pixels(values) else "neither"
    if kind == "boxes with points":
        return kind if box else "neither"
    if box != polygon:
        return "boxes with points" if box else "polygons"
    return kind


def _in_pixels(values: list[float]) -> bool:
    return len(values) % 2 == 0 and min(values) >= 0 and sum(v > _BEYOND for v in values) > 3


def is_polygon(values: list[float]) -> bool:
    """Return whether numbers can be corners, of fractions of the image."""
    inside = min(values) >= -_EDGE and max(values) <= 1 + _EDGE
    return len(values) >= 6 and len(values) % 2 == 0 and inside


def holds_points(values: list[float]) -> bool:
    """Return whether the first four numbers are a box in the image that holds the others.

    These are x, y of points, or x, y and whether it is visible; a negative point is none.
    """
    cx, cy, w, h = values[:4]
    if not (w > 0 and h > 0):
        return False
    sides = ((cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2))
    if not all(low >= -_EDGE and high <= 1 + _EDGE for low, high in sides):
        return False
    rest = values[4:]
    spans = ((cx, w * (0.5 + _SLACK)), (cy, h * (0.5 + _SLACK)))
    return any(len(rest) % step == 0 and _within(rest, step, spans) for step in (2, 3))


def _within(
    rest: list[float], step: int, spans: tuple[tuple[float, float], tuple[float, float]]
) -> bool:
    """Return whether the points that there are lie in spans, a middle and how far from it."""
    xs, ys = rest[::step], rest[1::step]
    shown = rest[2::3] if step == 3 else []
    if any(value not in (-1, 0, 1, 2) for value in shown):
        return False
    if shown or min(rest) < 0:
        seen = shown or [1.0] * len(xs)
        there = [(x, y) for x, y, v in zip(xs, ys, seen, strict=True) if min(x, y) >= 0 and v > 0]
        xs, ys = [x for x, _ in there], [y for _, y in there]
    return all(
        not values or (min(values) >= middle - reach and max(values) <= middle + reach)
        for values, (middle, reach) in zip((xs, ys), spans, strict=True)
    )


def around(values: list[float]) -> list[float]:
    """Return the box around corners x, y, x, y, ... as cxcywh."""
    xs, ys = values[::2], values[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
