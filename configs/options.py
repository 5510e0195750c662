"""An option: a dataclass field with a default, a help text, the values it may take, and a flag."""

import argparse
import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any, Literal, NoReturn, cast

from util.errors import ConfigError, nearest_hint

Section = type[Any]  # a dataclass of options
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    alias: str | None = None,
    unset: Any = None,
    rare: bool = False,
) -> Any:
    """Declare an option: its default, help, and bounds; a `Literal` type lists its choices.

    `low` and `high` are inclusive bounds, `above` an exclusive lower bound; for a tuple they hold
    for each element. `alias` is a second flag, and without its dashes a second name in files.
    `unset` is a value that files of earlier versions have where None is meant now. A `rare` option
    is only listed by --help_all.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "alias": alias}
    return field(default=default, metadata={**metadata, "unset": unset, "rare": rare})


class Checked:
    """A dataclass of options that checks choices and bounds when an instance is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(cast(Any, self)):
            value, choices = getattr(self, f.name), choices_of(hints[f.name])
            for item in value if isinstance(value, tuple) else (value,):
                if item is None:
                    continue
                if choices and item not in choices:
                    words = [str(choice) for choice in choices]
                    raise ConfigError(
                        f"{f.name}: must be one of {', '.join(words)}, not '{item}'. "
                        f"{nearest_hint(str(item), words)}"
                    )
                _check_bounds(f.name, item, f.metadata)


def _check_bounds(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    bounds = {
        f"at least {low}": low is None or value >= low,
        f"more than {above}": above is None or value > above,
        f"at most {high}": high is None or value <= high,
    }
    if not all(bounds.values()):
        stated = " and ".join(bound for bound in bounds if "None" not in bound)
        raise ConfigError(f"{name}: must be {stated}, not {value}.")


def _plain(annotation: Any) -> Any:
    """Return X for X | None, and the annotation itself otherwise."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _element(annotation: Any) -> Any | None:
    """Return X for tuple[X, ...], None for a scalar."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else None


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """Return the values that a `Literal`, or a tuple of them, allows; none for other types."""
    annotation = _plain(annotation)
    annotation = _element(annotation) or annotation
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def coerce(value: Any, annotation: Any, source: str) -> Any:
    """Turn a YAML value or a command-line string into the type of its field.

    Raises:
        ConfigError: the value has another type.
    """
    plain = _plain(annotation)
    if plain is not annotation and (value is None or (value == "none" and plain is not str)):
        return None
    element = _element(plain)
    if element is not None:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(item, element, source) for item in items)
    kind = type(choices[0]) if (choices := choices_of(plain)) else plain
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (int, float) and not isinstance(value, bool) and value is not None:
            return _to_number(value, kind)
        # YAML reads yes and off as truth values
        if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    raise ConfigError(f"{source}: must be {_NAMES[kind]}, not {value!r}.")


def _to_number(value: Any, kind: type[int] | type[float]) -> int | float:
    if kind is int and not isinstance(value, float):
        with contextlib.suppress(ValueError):
            return int(value)  # a float would round beyond 2**53
    number = float(value)  # YAML reads 1e-4 as a string
    if kind is int and number != int(number):
        raise ValueError(f"{value} is not whole")
    return kind(number)


class OptionParser(argparse.ArgumentParser):
    """A parser of flags that are derived from fields; it reports an error in one line."""

    def __init__(self, *, all_help: bool = False, **kwargs: Any) -> None:
        super().__init__(
            usage="%(prog)s [options]",
            allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=32),
            **kwargs,
        )
        self.all_help, self.hidden = all_help, 0
        self.sections: dict[str, Section] = {}
        self.add_argument("--help_all", action="help", help="list every option, rare ones too")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as ConfigError."""
        raise ConfigError(f"command line: {message}. --help lists the options.")

    def add_section(self, title: str, section: Section) -> None:
        """Add one flag for each field of a section; only flags that are given are set."""
        self.sections[title] = section
        group = self.add_argument_group(title)
        hints = typing.get_type_hints(section)
        for f in dataclasses.fields(section):
            self._add_flag(group, f, hints[f.name])

    def _add_flag(self, group: Any, f: "dataclasses.Field[Any]", annotation: Any) -> None:
        default, metadata = f.default, f.metadata
        flags = [f"--{f.name}", *([metadata["alias"]] if metadata["alias"] else [])]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = metadata["help"]
        if shown not in (None, "") and annotation is not bool:
            text += f" (default: {shown})"
        hidden = metadata["rare"] and not self.all_help
        self.hidden += hidden
        common = {"dest": f.name, "default": argparse.SUPPRESS}
        help = argparse.SUPPRESS if hidden else text.replace("%", "%%")
        if annotation is not bool:
            plain, choices = _plain(annotation), choices_of(annotation)
            element = _element(plain)
            metavar = "|".join(map(str, choices)) or _METAVARS[element or plain]
            many = {"nargs": "*"} if element is not None else {}
            group.add_argument(*flags, metavar=metavar, help=help, **many, **common)
            return
        # the help lists the flag that changes something
        off = argparse.SUPPRESS if hidden else f"turn off: {metadata['help']}".replace("%", "%%")
        on_help, off_help = (argparse.SUPPRESS, off) if default else (help, argparse.SUPPRESS)
        group.add_argument(*flags, action="store_true", help=on_help, **common)
        group.add_argument(f"--no_{f.name}", action="store_false", help=off_help, **common)

    def parse_options(
        self, argv: Sequence[str], recipes: Mapping[str, Section] | None = None
    ) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Parse a command line into the parser's own arguments and the given options by section.

        Raises:
            ConfigError: an unknown flag (the nearest one is named, or the recipe it belongs to) or
                a value of another type.
        """
        args, unknown = self.parse_known_args(argv)
        if unknown:
            hint = nearest_hint(unknown[0], self.flags, "--help_all lists the options.")
            for recipe, section in (recipes or {}).items():
                if unknown[0] in [f"--{f.name}" for f in dataclasses.fields(section)]:
                    hint = f"It is an option of a recipe: add --recipes {recipe}."
            raise ConfigError(f"command line: unknown option '{unknown[0]}'. {hint}")
        values: dict[str, Any] = {}
        for title, section in self.sections.items():
            names = [f.name for f in dataclasses.fields(section) if hasattr(args, f.name)]
            given = {name: getattr(args, name) for name in names}
            values[title] = check_names(given, section, "--", "")
        return args, {title: given for title, given in values.items() if given}

    @property
    def flags(self) -> list[str]:
        """Return every flag, hidden ones too."""
        return [flag for action in self._actions for flag in action.option_strings]

    def format_help(self) -> str:
        """Return the help, which names the way to the options that it leaves out."""
        if self.hidden:
            self.epilog = f"--help_all lists {self.hidden} more options, which are rarely used."
        return super().format_help()


def check_names(
    values: Mapping[Any, Any], section: Section, source: str, title: str
) -> dict[str, Any]:
    """Check the names of options and coerce their values; aliases become names.

    Raises:
        ConfigError: a name is unknown or a value has another type; `source` is named.
    """
    hints = typing.get_type_hints(section)
    fields = {f.name: f for f in dataclasses.fields(section)}
    aliases = {f.metadata["alias"].lstrip("-"): f for f in fields.values() if f.metadata["alias"]}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        f = fields.get(name) or aliases.get(name)
        if f is None:
            hint = nearest_hint(str(name), list(hints))
            raise ConfigError(f"{source}unknown option '{title}{name}'. {hint}")
        coerced = coerce(value, hints[f.name], f"{source}{title}{f.name}")
        unset = f.metadata["unset"]
        checked[f.name] = None if unset is not None and coerced == unset else coerced
    return checked


def with_dashes(message: str, names: Collection[str]) -> str:
    """Write the options that an error names as flags; see `util.errors.UserError`."""

    def flag(match: "re.Match[str]") -> str:
        name = match[1] or match[2]
        if name not in names:
            return match[0]
        return f"--{name}" if match[1] else f"--{name}{match[3]}"

    return re.sub(r"^(\w+)(?=:| \S+: )|`(\w+)((?: [^`]*)?)`", flag, message)
