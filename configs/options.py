"""An option: a dataclass field with a default, a help text and the values that it may take."""

import contextlib
import dataclasses
import math
import operator
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from decimal import Decimal
from typing import Any, Literal, cast

from configs.other_names import unknown_hint
from util.errors import ConfigError, brief, nearest_hint

Section = type[Any]  # a dataclass of options
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOUNDS = {
    "low": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "high": ("at most", operator.le),
}
_MOST = 2**53  # of a whole number, where an option states none
_DIGITS = 5000  # of a whole number that is written with an exponent
METAVARS = {int: "N", float: "X", str: "TEXT"}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    most: int | None = None,
    alias: str | None = None,
    off: str | None = None,
    unset: Any = None,
    rare: bool = False,
) -> Any:
    """Declare an option: its default, help, and bounds; a `Literal` type lists its choices.

    `low` and `high` are inclusive bounds, `above` an exclusive lower bound; for a tuple they hold
    for each element. `most` is a bound beyond all use, which protects from files that would take
    all memory, and is not named before it is passed. `alias` is a second name. `off` is the help of
    a switch's negative form, else "without ...". `unset` is a value that files of earlier versions
    have where None is meant now. A `rare` option is only listed by --help_all.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "high": high,
            "above": above,
            "most": most,
            "alias": alias,
            "off": off,
            "unset": unset,
            "rare": rare,
        },
    )


def _by_name(section: Section) -> dict[str, "dataclasses.Field[Any]"]:
    """Return the fields of a section by their names and aliases."""
    fields = dataclasses.fields(section)
    return {name: f for f in fields for name in (f.name, f.metadata["alias"]) if name}


class Checked:
    """A dataclass of options that checks choices and bounds when an instance is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(cast(Any, self)):
            value, choices = getattr(self, f.name), parts_of(hints[f.name])[1]
            for item in value if isinstance(value, tuple) else (value,):
                if item is None:
                    continue
                most = f.metadata["most"] or (math.inf if isinstance(item, float) else _MOST)
                if isinstance(item, (int, float)) and (abs(item) > most or abs(item) == math.inf):
                    raise ConfigError(f"{f.name}: must be at most {most}, not {brief(item)}.")
                if choices and item not in choices:
                    words = [str(choice) for choice in choices]
                    raise ConfigError(
                        f"{f.name}: must be one of {', '.join(words)}, not '{item}'. "
                        f"{nearest_hint(str(item), words)}"
                    )
                bounds = {
                    f"{words} {f.metadata[key]}": holds(item, f.metadata[key])
                    for key, (words, holds) in _BOUNDS.items()
                    if f.metadata[key] is not None
                }
                if not all(bounds.values()):
                    raise ConfigError(f"{f.name}: must be {' and '.join(bounds)}, not {item}.")


def parts_of(annotation: Any) -> tuple[Any, tuple[Any, ...], bool, bool]:
    """Return a plain type, its choices, whether there may be several, and whether None is one."""
    optional = isinstance(annotation, types.UnionType)
    if optional:
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    several = typing.get_origin(annotation) is tuple
    kind = typing.get_args(annotation)[0] if several else annotation
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return type(choices[0]) if choices else kind, choices, several, optional


def coerce(value: Any, annotation: Any, source: str) -> Any:
    """Turn a YAML value or a command-line string into the type of its field.

    Raises:
        ConfigError: the value has another type.
    """
    kind, _, several, optional = parts_of(annotation)
    if optional and (value is None or value == "none"):
        return None
    if several:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(item, kind, source) for item in items)
    if isinstance(value, bool) == (kind is bool):  # YAML reads yes and off as truth values
        with contextlib.suppress(TypeError, ValueError, ArithmeticError):
            if kind is float:
                return float(value)  # YAML reads 1e-4 as a string
            if kind is int and _is_whole(number := Decimal(str(value))):
                return int(number)
            if kind is bool or (kind is str and isinstance(value, (str, int, float, os.PathLike))):
                if "\0" in str(value):
                    raise ValueError  # no path or name may have it
                return kind(value)
    raise ConfigError(f"{source}: must be {_NAMES[kind]}, not {brief(value)}.")


def _is_whole(number: Decimal) -> bool:
    """Return whether it is a whole number, without writing 1e999999999 out."""
    return number.is_finite() and number.adjusted() < _DIGITS and number == int(number)


def check_names(
    values: Mapping[Any, Any], section: Section, source: str, title: str
) -> dict[str, Any]:
    """Check the names of options and coerce their values; aliases become names.

    Raises:
        ConfigError: a name is unknown or a value has another type; `source` is named.
    """
    hints = typing.get_type_hints(section)
    fields = _by_name(section)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            hint = unknown_hint(str(name), list(hints))
            raise ConfigError(f"{source}unknown option '{title}{name}'. {hint}")
        f = fields[name]
        coerced = coerce(value, hints[f.name], f"{source}{title}{f.name}")
        unset = f.metadata["unset"]
        checked[f.name] = None if unset is not None and coerced == unset else coerced
    return checked


def by_section(
    options: Mapping[str, Any], sections: Mapping[str, Section], source: str = ""
) -> dict[str, dict[str, Any]]:
    """Return options that are given by their names alone, by section; see `check_names`."""
    owners = {name: title for title, kind in sections.items() for name in _by_name(kind)}
    values: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in owners:
            raise ConfigError(f"{source}unknown option '{name}'. {unknown_hint(name, owners)}")
        given = check_names({name: value}, sections[owners[name]], source, "")
        values.setdefault(owners[name], {}).update(given)
    return values
