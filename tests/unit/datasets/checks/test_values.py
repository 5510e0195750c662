"""Values that tools write as text, and boxes that only a mask shows."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle

from datasets.checks.masks import box_around
from datasets.checks.values import to_box, to_flag, to_number, to_whole


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1), (" 2.5 ", 2.5), ("-3", -3), ("1e2", 100), (".5", 0.5), ("7.", 7),
        ("", None), ("x", None), ("1,5", None), ("1_0", None), ("nan", None), ("inf", None),
        ("0x10", None), ("१", None), ("9" * 5000, None), ("1 2", None), (3, None), (None, None),
    ],
)  # fmt: skip
def test_text_is_a_number_only_if_it_is_all_of_one(text: Any, number: float | None) -> None:
    assert to_number(text) == number


def test_whole_numbers_of_text_lose_no_digit() -> None:
    assert to_whole("9007199254740993") == 9007199254740993
    assert to_whole("12.0") == 12
    assert to_whole(12.0) == 12
    assert to_whole("12.5") is None
    assert to_whole("9" * 19) is None  # more than 64 bits
    assert to_whole(True) is None


def test_flags() -> None:
    texts = ("1", "true", " True", "1.0", "0", "FALSE", "yes", "", "2")
    assert [to_flag(text) for text in texts] == [1, 1, 1, 1, 0, 0, None, None, None]
    assert to_flag([1]) is None


def test_boxes_of_text() -> None:
    value: Any
    for value in (["1", 2, "3.5", 4], "1 2 3.5 4", "[1, 2, 3.5, 4]", "(1,2,3.5,4)", "1;2;3.5;4"):
        assert to_box(value) == [1, 2, 3.5, 4]
    for value in ("1 2 3", ["1", 2, 3], ["1", 2, 3, None], "1 2 3 x", ["1e12", 2, 3, 4], 5):
        assert to_box(value) is None


@pytest.mark.parametrize(
    ("polygons", "box"),
    [
        ([[1, 2, 5, 2, 5, 8]], [1, 2, 4, 6]),
        ([[1, 2, 5, 2, 5, 8], [0.5, 3, 2, 3, 2, 4]], [0.5, 2, 4.5, 6]),
        ([1, 2, 5, 2, 5, 8], [1, 2, 4, 6]), ([[], [1, 2, 5, 2, 5, 8]], [1, 2, 4, 6]),
        ([[1, 2], [5, 2], [5, 8]], [1, 2, 4, 6]),
        ([["1", "2", "5", "2", "5", "8"]], [1, 2, 4, 6]),
        ([[1, 2, 5, 2]], None), ([[1, 2, 5, 2, 5]], None), ([[1, 2, 5, 2, 5, 2]], None),
        ([[1, 2, 5, None, 5, 8]], None), ([[1, 2, math.nan, 2, 5, 8]], None), ([], None),
        ([[]], None), (None, None), ("polygon", None), ({}, None), ([{}, {}], None),
    ],
)  # fmt: skip
def test_boxes_around_polygons(polygons: Any, box: list[float] | None) -> None:
    assert box_around(polygons) == box


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
def test_boxes_around_runs_are_those_of_the_pixels(
    seed: int, height: int, width: int, share: float
) -> None:
    pixels = np.random.default_rng(seed).random((height, width)) < share
    ys, xs = np.nonzero(pixels)
    box = None
    if len(xs):
        x, y = int(xs.min()), int(ys.min())
        box = [x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1]
    packed = rle.encode(np.asfortranarray(pixels.astype(np.uint8)))
    text = {"size": [height, width], "counts": packed["counts"].decode()}
    column = pixels.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(column, prepend=0, append=2))
    counts = np.diff(edges, prepend=0).tolist()
    assert sum(counts) == height * width
    assert box_around(text) == box
    assert box_around({"size": [height, width], "counts": counts}) == box


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [0, 4], "counts": "04"}, {"size": [4, 10**9], "counts": "04"},
        {"size": [4], "counts": "04"}, {"size": "44", "counts": "04"}, {"counts": "04"},
        {"size": [4, 4]}, {"size": [4, 4], "counts": ""}, {"size": [4, 4], "counts": "0\x00"},
        {"size": [4, 4], "counts": "0o"}, {"size": [4, 4], "counts": "0é"},
        {"size": [4, 4], "counts": [1, 2]}, {"size": [4, 4], "counts": [-1, 17]},
        {"size": [4, 4], "counts": [0, 10**30]}, {"size": [4, 4], "counts": [0, "16"]},
        {"size": [4, 4], "counts": "0`1"},
    ],
)  # fmt: skip
def test_masks_that_would_lead_pycocotools_astray_are_none(mask: dict[str, Any]) -> None:
    assert box_around(mask) is None


@given(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=40))
def test_any_text_of_runs_is_safe(counts: str) -> None:
    box = box_around({"size": [5, 7], "counts": counts})
    assert box is None or (box[0] + box[2] <= 7 and box[1] + box[3] <= 5)
