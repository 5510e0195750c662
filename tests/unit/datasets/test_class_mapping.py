"""Classes of the data and labels of a model: by name, by id, or not at all."""

import pytest

from datasets.class_mapping import map_classes
from util.classes import Classes
from util.errors import DataError

ANIMALS = Classes((3, 7), ("dog", "cat"))
OFFICIAL_UNNAMED = Classes(tuple(range(91)), ("",) * 91)
OFFICIAL = Classes(
    tuple(range(91)), tuple({17: "cat", 18: "dog", 1: "person"}.get(i, "") for i in range(91))
)


@pytest.mark.parametrize(
    ("data", "model", "expected"),
    [
        (ANIMALS, ANIMALS, {3: 0, 7: 1}),
        (ANIMALS, Classes((1, 2, 3), ("cat", "dog", "bird")), {3: 1, 7: 0}),
        (ANIMALS, OFFICIAL, {3: 18, 7: 17}),
        (Classes((1, 17), ("person", "cat")), OFFICIAL_UNNAMED, {1: 1, 17: 17}),
        (Classes((3, 7), ("3", "7")), ANIMALS, {3: 0, 7: 1}),
        (Classes((7,), ("cat",)), ANIMALS, {7: 1}),
        (Classes((1, 2), ("cell", "cell")), Classes((1, 2), ("cell", "cell")), {1: 0, 2: 1}),
    ],
)
def test_classes_are_matched(data: Classes, model: Classes, expected: dict[int, int]) -> None:
    assert map_classes(data, model) == expected


@pytest.mark.parametrize(
    ("data", "model", "named"),
    [
        (Classes((3, 9), ("dog", "emu")), ANIMALS, "does not know 1 of the 2 in the data: 'emu'"),
        (
            Classes((3, 7), ("cat", "emu")),
            ANIMALS,
            "does not know 2 of the 2 in the data: 'cat', 'emu'",
        ),
        (Classes((12,), ("street sign",)), OFFICIAL, "'street sign'"),
        (Classes((95,), ("kite",)), OFFICIAL_UNNAMED, "'kite'"),
    ],
)
def test_unknown_classes_are_listed(data: Classes, model: Classes, named: str) -> None:
    with pytest.raises(DataError, match=named):
        map_classes(data, model)
