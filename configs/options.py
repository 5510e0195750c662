"""An option: a dataclass field with a default, a help text, the values it may take, and a flag."""

import argparse
import contextlib
import dataclasses
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from decimal import Decimal
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
            value, choices = getattr(self, f.name), _parts(hints[f.name])[1]
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


def _parts(annotation: Any) -> tuple[Any, tuple[Any, ...], bool, bool]:
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
    kind, _, several, optional = _parts(annotation)
    if optional and (value is None or value == "none"):
        return None
    if several:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(item, kind, source) for item in items)
    if isinstance(value, bool) == (kind is bool):  # YAML reads yes and off as truth values
        with contextlib.suppress(TypeError, ValueError, ArithmeticError):
            if kind is float:
                return float(value)  # YAML reads 1e-4 as a string
            if kind is int and (number := Decimal(str(value))) == int(number):
                return int(number)
            if kind is bool or (kind is str and isinstance(value, (str, int, float, os.PathLike))):
                return kind(value)
    raise ConfigError(f"{source}: must be {_NAMES[kind]}, not {value!r}.")


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
            kind, choices, several, _ = _parts(annotation)
            common["metavar"] = "|".join(map(str, choices)) or _METAVARS[kind]
            group.add_argument(*flags, nargs="*" if several else None, help=help, **common)
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
            name = unknown[0].partition("=")[0]
            hint = nearest_hint(name, self.flags, "--help_all lists the options.")
            for recipe, section in (recipes or {}).items():
                if name in [f"--{f.name}" for f in dataclasses.fields(section)]:
                    hint = f"It is an option of a recipe: add --recipes {recipe}."
            raise ConfigError(f"command line: unknown option '{name}'. {hint}")
        names = [f.name for kind in self.sections.values() for f in dataclasses.fields(kind)]
        given = {name: getattr(args, name) for name in names if hasattr(args, name)}
        return args, by_section(given, self.sections, "--")

    @property
    def flags(self) -> list[str]:
        """Return every flag, hidden ones too."""
        return [flag for action in self._actions for flag in action.option_strings]

    def format_help(self) -> str:
        """Return the help, which names the way to the options that it leaves out."""
        if self.hidden:
            self.epilog = f"--help_all lists rarely used options, too: {self.hidden} more."
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


def by_section(
    options: Mapping[str, Any], sections: Mapping[str, Section], source: str = ""
) -> dict[str, dict[str, Any]]:
    """Return options that are given by their names alone, by section; see `check_names`."""
    owners = {
        name.lstrip("-"): title
        for title, kind in sections.items()
        for f in dataclasses.fields(kind)
        for name in (f.name, f.metadata["alias"])
        if name
    }
    values: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in owners:
            raise ConfigError(f"{source}unknown option '{name}'. {nearest_hint(name, owners)}")
        given = check_names({name: value}, sections[owners[name]], source, "")
        values.setdefault(owners[name], {}).update(given)
    return values


def with_dashes(message: str, names: Collection[str]) -> str:
    """Write the options that an error names as flags; see `util.errors.UserError`."""

    def flag(match: "re.Match[str]") -> str:
        name, value = match["name"] or match["quoted"] or match["word"], match["value"] or ""
        return f"--{name}{value}" if name in names else match[0]

    return re.sub(
        r"^(?P<name>\w+)(?=:| \S+: )"
        r"|`(?P<quoted>\w+)(?P<value>(?: [^`]*)?)`"
        r"|(?<![\w./'`-])(?P<word>\w+_\w+)(?![\w/'`]|\.\w)",
        flag,
        message,
    )
