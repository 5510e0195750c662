"""Which tests a run takes: cases left to `make test_all`, and what needs newer packages."""

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values as parameters, with all but `quick` marked as slow."""
    slow = pytest.mark.slow
    return [v if v in quick else pytest.param(v, marks=slow) for v in values]


def as_published(version: str) -> bool:
    """Return whether a version of transformers has the code that tests compare with.

    With 5.2, the oldest that they run with, Grounding DINO, LW-DETR's groups and DETR on a dilated
    backbone give other numbers or take other arguments; 5.24 agrees.
    """
    return tuple(int(part) for part in version.split(".")[:2]) >= (5, 24)
