"""What JSON values can stand for: numbers, also written as text, ids, flags, areas."""

import re
from collections.abc import Sequence
from typing import Any, TypeGuard

LIMIT = 1e9  # of numbers that can be pixels
_NUMBER = re.compile(r"[+-]?(\d{1,30}\.?\d{0,30}|\.\d{1,30})(e[+-]?\d{1,3})?", re.ASCII | re.I)
_BETWEEN = re.compile(r"[\s,;]+")
_FLAGS = {"true": 1, "false": 0, "1": 1, "0": 0}
_LONGEST = 200  # characters of four numbers


def is_whole(value: Any) -> TypeGuard[int]:
    """Return whether a JSON value is a whole number of 64 bits; 3.0 is, as tables write it."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and abs(value) < 2**63


def is_area(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value can be an area."""
    return is_number(value) and value >= 0


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number (NaN and Infinity fail the comparison)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LIMIT


def to_number(value: Any) -> float | None:
    """Return the number that a text is, None for another text or value."""
    text = value.strip() if isinstance(value, str) and len(value) <= _LONGEST else ""
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def to_whole(value: Any) -> int | None:
    """Return the whole number that a value is, as text too; None for others."""
    if isinstance(value, str):
        text = value.strip()
        exact = text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20
        value = int(text) if exact else to_number(text)  # a float would round large ids
    return int(value) if is_whole(value) else None


def to_flag(value: Any) -> int | None:
    """Return the 0 or 1 that a text is, None for another text or value."""
    text = value.strip().lower() if isinstance(value, str) else ""
    number = to_number(text)
    return _FLAGS.get(text if number is None else f"{number:g}")


def to_box(value: Any) -> list[float] | None:
    """Return four numbers of which some or all are text: a list of them, or one text."""
    if isinstance(value, str) and len(value) <= _LONGEST:
        value = _BETWEEN.split(value.strip().strip("[]()").strip())
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers: list[Any] = [to_number(n) if isinstance(n, str) else n for n in value]
    return numbers if all(map(is_number, numbers)) else None


def column(entries: Sequence[Any], key: str) -> list[Any]:
    """Return what entries have under a key, None where that is nothing."""
    return [entry.get(key) if isinstance(entry, dict) else None for entry in entries]
