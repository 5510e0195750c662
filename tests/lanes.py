"""Which cases of a parametrised test every run takes, and which only `make test_all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values as parameters, with all but `quick` marked as slow."""
    slow = pytest.mark.slow
    return [v if v in quick else pytest.param(v, marks=slow) for v in values]
