"""Lines of YOLO files: what more than four numbers are, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from configs.schema import DataConfig
from datasets.build import load_index
from datasets.formats.yolo_lines import Line, Lines, judge
from datasets.images import is_image
from tests.unit.datasets.formats.exports import (
    KETTLE,
    MUG,
    TRUTH,
    save_images,
    write_yaml,
    write_yolo,
    yolo_line,
)
from tests.unit.datasets.formats.test_layouts import boxes, notes
from util.errors import DataError

RED = [0.25, 0.5, 0.3, 0.5]  # a box as fractions
BLUE = [0.7, 0.3, 0.2, 0.4]
PLATE = [0.15, 0.60, 0.35, 0.60, 0.35, 0.70, 0.15, 0.70]
FACE = [0.2, 0.4, 0.3, 0.4, 0.25, 0.5, 0.2, 0.6, 0.3, 0.6]
NO_FACE = [-1.0] * 10


def read(*lines: list[float], points: int | None = None) -> Lines:
    """Return what lines of class 0 are, all of one image."""
    return judge([[Line(f"a.txt:{n}", 0, v) for n, v in enumerate(lines, 1)]], points=points)


def found(lines: Lines) -> list[list[float]]:
    return [[round(v, 6) for v in box] for _, box in lines.boxes[0]]


def test_points_in_their_box_follow_it() -> None:
    lines = read(*[RED + PLATE] * 3, BLUE)
    assert found(lines) == [RED] * 3 + [BLUE]
    assert lines.counts == {"boxes with points": 3, "boxes": 1}


def test_invisible_points_are_recognised_by_their_sign() -> None:
    """One such line shows what the others of its length are."""
    lines = read(RED + FACE, BLUE + NO_FACE)
    assert found(lines) == [RED, BLUE]
    assert lines.counts == {"boxes with points": 2}
    assert found(read(BLUE + NO_FACE)) == [BLUE]


def test_points_with_visibility() -> None:
    pose = [*RED, 0.2, 0.5, 2, 0, 0, 0, 0.3, 0.6, 1]
    assert found(read(pose)) == [RED]
    outside = [*RED, 0.9, 0.9, 2, 0, 0, 0, 0.3, 0.6, 1]
    assert read(outside).wrong == [
        ("a.txt:1", "13 numbers after the class are neither a polygon nor a box that holds its "
         "points"),
    ]  # fmt: skip


def test_polygons_are_polygons_whatever_their_lengths() -> None:
    triangle, square = [0.1, 0.2, 0.5, 0.2, 0.3, 0.4], [0.6, 0.6, 0.8, 0.6, 0.8, 0.8, 0.6, 0.8]
    lines = read(triangle, square, triangle)
    assert found(lines) == [[0.3, 0.3, 0.4, 0.2], [0.7, 0.7, 0.2, 0.2], [0.3, 0.3, 0.4, 0.2]]
    assert lines.counts == {"polygons": 3}


def test_many_random_polygons_are_never_taken_for_boxes() -> None:
    rng = np.random.default_rng(3)
    for corners in (3, 4, 8):
        angles = np.sort(rng.uniform(0, 2 * np.pi, (60, corners)), axis=1)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=2)
        middle, radius = rng.uniform(0.3, 0.7, (2, 60, 1, 2))
        polygons = np.clip(middle + radius * circle * 0.6, 0, 1).reshape(60, -1)
        lines = read(*polygons.tolist())
        assert lines.counts == {"polygons": 60}
        assert not lines.wrong


def test_ambiguous_layouts_are_refused() -> None:
    lines = read(RED + PLATE)
    assert not lines.boxes[0]
    ((place, why),) = lines.wrong
    assert place == "a.txt:1"
    assert why.startswith("12 numbers after the class may be a polygon or a box and points: set")
    assert found(read(RED + PLATE, points=8)) == [RED]
    assert read(RED + PLATE, points=6).wrong == [
        ("a.txt:1", "12 numbers after the class are not the 4 of a box and 6 of `kpt_shape`")
    ]


def test_values_of_pixels_are_counted() -> None:
    polygon = [10.0, 10.0, 50.0, 10.0, 30.0, 40.0]
    lines = read([25.0, 40.0, 30.0, 40.0], polygon, RED, [5.0, 0.5, 0.1, 0.1])
    assert [place for place, _ in lines.pixels] == ["a.txt:1", "a.txt:2"]
    assert found(lines) == [
        RED,
        [5.0, 0.5, 0.1, 0.1],
    ]  # the last lies outside: which the check reports


def load_lines(place: Path, lines: str) -> dict[str, str]:
    write_yolo(place / "images", place / "labels", lines=lines)
    write_yaml(place, train="images", val="images")
    return notes(load_index(DataConfig(data_path=str(place)), "train"))


def test_how_lines_were_read_is_reported(tmp_path: Path) -> None:
    triangle = "1 0.6 0.125 0.8 0.125 0.7 0.5\n"
    notes = load_lines(tmp_path, yolo_line(0, KETTLE) + triangle)
    assert "lines read: 3 as boxes, 3 as polygons (the box around each)" in notes["long_lines"]
    index = load_index(DataConfig(data_path=str(tmp_path)), "train")
    assert boxes(index) == TRUTH


@pytest.mark.parametrize(
    ("first", "expected"),
    [(1, "indices 1 to 2 with 2 names, of 0 to 1"), (0, None), (2, None)],
)
def test_classes_that_count_from_one_are_reported(
    tmp_path: Path, first: int, expected: str | None
) -> None:
    lines = yolo_line(first, KETTLE) + yolo_line(min(first + 1, 2), MUG)
    if first == 2:  # none is 0, but 2 is all there is: 1 and 2 cannot be distinguished
        lines = yolo_line(1, KETTLE)
    note = load_lines(tmp_path, lines).get("one_based_class")
    assert note is None if expected is None else expected in str(note)


def test_pixels_are_refused_with_the_place_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shot_1.txt:1: \[25.0, .* in 6 lines. Are they pixels"):
        load_lines(tmp_path, "0 25 40 30 40\n1 70 25 20 30\n")


def test_suffixes_that_pillow_opens_are_images_and_system_files_are_not(tmp_path: Path) -> None:
    paths = save_images(tmp_path, 1, suffix=".jfif") + save_images(tmp_path, 1, suffix=".PPM")
    paths += save_images(tmp_path, 1)
    for name in ("._shot_1.png", "a.txt", "a.eps", "a.h5", "a.pdf"):
        (tmp_path / name).write_bytes(b"none")
    assert sorted(path for path in tmp_path.iterdir() if is_image(path)) == sorted(paths)
