"""Labels, category ids and names."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from util.classes import Classes

identities = st.dictionaries(st.integers(-5, 10**9), st.text(max_size=8), max_size=20)


@given(identities)
def test_json_round_trip(named: dict[int, str]) -> None:
    classes = Classes(tuple(named), tuple(named.values()))
    assert Classes.from_json(json.loads(json.dumps(classes.to_json()))) == classes


def test_inconsistent_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 category ids but 1 names"):
        Classes((1, 2), ("a",))
    with pytest.raises(ValueError, match="repeat"):
        Classes((1, 1), ("a", "b"))
