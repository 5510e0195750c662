"""Objects keep their numbers while they move, and others never get them."""

import sys

import numpy as np
import pytest

from engine.detector import Box
from engine.tracking import Tracks
from util.errors import ConfigError

THRESHOLDS = {"cat": 0.5, "dog": 0.6}


def box(name: str, x: float, y: float, score: float = 0.9, side: float = 30) -> Box:
    return Box(name, 1, score, (x, y, x + side, y + side))


@pytest.fixture
def tracks() -> Tracks:
    pytest.importorskip("trackers")
    return Tracks(THRESHOLDS, rate=10.0, patience=1.0)


def test_objects_keep_their_numbers_while_they_pass_each_other(tracks: Tracks) -> None:
    random = np.random.default_rng(0)
    seen: list[dict[str, int | None]] = []
    for frame in range(40):
        places = {
            "right": (5.0 * frame, 20.0),
            "left": (200 - 5.0 * frame, 60.0),
            "still": (90, 200),
        }
        order = random.permutation(list(places)).tolist()
        jitter = random.uniform(-1, 1, (3, 2))
        boxes = [box("cat", *(np.array(places[n]) + j)) for n, j in zip(order, jitter, strict=True)]
        seen.append(dict(zip(order, tracks(boxes), strict=True)))
    assert set(seen[0].values()) == {None}
    assert sorted(n for n in seen[1].values() if n is not None) == [1, 2, 3]
    assert all(numbers == seen[1] for numbers in seen[1:])


def test_a_lost_object_has_its_number_again_unless_it_was_gone_for_too_long(tracks: Tracks) -> None:
    def frames(count: int, boxes: list[Box]) -> list[int | None]:
        return [number for _ in range(count) for number in tracks(boxes)]

    assert frames(5, [box("cat", 50, 50)]) == [None, 1, 1, 1, 1]
    frames(6, [])
    assert frames(2, [box("cat", 50, 50)]) == [1, 1]
    frames(15, [])
    assert frames(3, [box("cat", 50, 50)])[-1] == 2
    for _ in range(30):
        frames(15, [])
        frames(3, [box("cat", 50, 50)])
    assert frames(1, [box("cat", 50, 50)]) == [32]
    assert len(tracks._objects) == 1  # memory stays what it is


def test_classes_are_followed_apart(tracks: Tracks) -> None:
    for _ in range(3):
        numbers = tracks([box("cat", 50, 50), box("dog", 50, 50)])
    assert sorted(map(str, numbers)) == ["1", "2"]
    assert tracks([box("dog", 52, 50)]) == [numbers[1]]
    assert tracks([box("cow", 50, 50)]) == [None]


def test_unsure_boxes_continue_objects_and_begin_none(tracks: Tracks) -> None:
    for _ in range(5):
        assert tracks([box("cat", 50, 50, score=0.4)]) == [None]
    tracks([box("cat", 50, 50)])
    assert tracks([box("cat", 50, 50)]) == [1]
    assert tracks([box("cat", 51, 50, score=0.1)]) == [1]
    assert tracks([box("cat", 51, 50, score=0.01)]) == [None]
    assert tracks([]) == []
    assert tracks([box("cat", 51, 50), box("cat", 51, 150, score=0.3)]) == [1, None]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ConfigError, match="pip install trackers"):
        Tracks(THRESHOLDS, rate=10.0, patience=1.0)
