"""Labels, category ids and names."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from util.classes import Classes

identities = st.dictionaries(st.integers(-5, 10**9), st.text(max_size=8), max_size=20)


@given(identities)
def test_categories_are_ordered_by_id_whatever_their_order_in_the_file(
    named: dict[int, str],
) -> None:
    categories = [{"id": i, "name": name, "supercategory": "x"} for i, name in named.items()]
    classes = Classes.from_categories(categories)
    assert classes.ids == tuple(sorted(named))
    assert len(classes) == len(named)
    for category, name in named.items():
        assert classes.names[classes.label_of[category]] == (name or str(category))


@given(identities)
def test_json_round_trip(named: dict[int, str]) -> None:
    classes = Classes(tuple(named), tuple(named.values()))
    assert Classes.from_json(json.loads(json.dumps(classes.to_json()))) == classes


def test_an_unnamed_category_is_called_by_its_id() -> None:
    for number in (3, 3.0):
        assert Classes.from_categories([{"id": number}]).names == ("3",)


def test_inconsistent_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 category ids but 1 names"):
        Classes((1, 2), ("a",))
    with pytest.raises(ValueError, match="repeat"):
        Classes((1, 1), ("a", "b"))
