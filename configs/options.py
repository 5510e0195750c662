"""Options declared once as dataclass fields: flags, YAML files and precedence follow from them.

Precedence: default < `base` file < file < command line.
"""

import argparse
import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from util.errors import ConfigError, nearest_hint

T = TypeVar("T")
Section = type[Any]
Values = dict[str, dict[str, Any]]


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    alias: str | None = None,
) -> Any:
    """Declare an option: its default, help, and the values it may take.

    `low` and `high` are inclusive bounds, `above` an exclusive lower bound; for a tuple they hold
    for each element. `alias` is a second name for it, as a flag and in files.
    """
    return field(
        default=default,
        metadata={
            "help": help, "choices": choices, "low": low, "high": high, "above": above,
            "alias": alias,
        },
    )  # fmt: skip


def check_values(section: Any) -> None:
    """Raise ConfigError if a field lies outside its declared choices or bounds."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        choices = f.metadata["choices"]
        for item in value if isinstance(value, tuple) else (value,):
            if choices is not None and item not in choices:
                wanted = ", ".join(map(str, choices))
                raise ConfigError(
                    f"--{f.name}: expected one of {wanted}, got '{item}'. "
                    f"{nearest_hint(str(item), [str(c) for c in choices])}"
                )
            _check_bounds(f.name, item, f.metadata)


def _check_bounds(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    too_low = low is not None and not value >= low
    too_high = high is not None and not value <= high
    if too_low or too_high or (above is not None and not value > above):
        parts = [
            *([f"at least {low}"] if low is not None else []),
            *([f"more than {above}"] if above is not None else []),
            *([f"at most {high}"] if high is not None else []),
        ]
        raise ConfigError(f"--{name}: expected {' and '.join(parts)}, got {value}.")


def _element_type(annotation: Any) -> Any | None:
    """Return X for tuple[X, ...], None for a scalar."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else None


def coerce(value: Any, annotation: Any, source: str) -> Any:
    """Turn a YAML value or a command-line string into the type of its field.

    Raises:
        ConfigError: the value has another type.
    """
    if isinstance(annotation, types.UnionType):
        if value is None:
            return None
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    element = _element_type(annotation)
    if element is not None:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(item, element, source) for item in items)
    try:
        if annotation is bool and isinstance(value, bool):
            return value
        if annotation in (int, float) and not isinstance(value, bool) and value is not None:
            return _to_number(value, annotation)
        plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        if annotation is str and plain:  # YAML reads yes and off as truth values
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{source}: expected {annotation.__name__}, got {value!r}.")


def _to_number(value: Any, annotation: type[int] | type[float]) -> int | float:
    if annotation is int and not isinstance(value, float):
        with contextlib.suppress(ValueError):
            return int(value)  # a float would round beyond 2**53
    number = float(value)  # YAML reads 1e-4 as a string
    if annotation is int and number != int(number):
        raise ValueError(f"{value} is not whole")
    return annotation(number)


class OptionParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage of sixty options."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as ConfigError."""
        raise ConfigError(f"command line: {message}. --help lists the options.")


def add_options(parser: argparse.ArgumentParser, sections: Mapping[str, Section]) -> None:
    """Add one flag per field, grouped by section; only flags given are set."""
    for title, section in sections.items():
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(section)
        for f in dataclasses.fields(section):
            _add_flag(group, f, hints[f.name])


def _add_flag(group: Any, f: "dataclasses.Field[Any]", annotation: Any) -> None:
    flag, default = f"--{f.name}", f.default
    shown = "" if default in (None, "", ()) else f" (default: {default})"
    common: dict[str, Any] = {
        "dest": f.name,
        "default": argparse.SUPPRESS,
        "help": (f.metadata["help"] + shown).replace("%", "%%"),
    }
    aliases = [f.metadata["alias"]] if f.metadata["alias"] else []
    if annotation is bool:
        group.add_argument(flag, *aliases, action="store_true", **common)
        group.add_argument(
            f"--no_{f.name}",
            dest=f.name,
            action="store_false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if not default else f"turn --{f.name} off",
        )
        return
    many = {"nargs": "*"} if _element_type(annotation) is not None else {}
    metavar = "|".join(map(str, f.metadata["choices"])) if f.metadata["choices"] else f.name.upper()
    group.add_argument(flag, *aliases, metavar=metavar, **many, **common)


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], sections: Mapping[str, Section]
) -> tuple[argparse.Namespace, Values]:
    """Parse a command line into the parser's own arguments and values by section.

    Raises:
        ConfigError: an unknown flag (the nearest one is named) or a value of another type.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s for a in parser._actions for s in a.option_strings]
        raise ConfigError(
            f"command line: unknown option '{unknown[0]}'. {nearest_hint(unknown[0], known)}"
        )
    values: Values = {}
    for title, section in sections.items():
        for name, annotation in typing.get_type_hints(section).items():
            if hasattr(args, name):
                value = coerce(getattr(args, name), annotation, f"--{name}")
                values.setdefault(title, {})[name] = value
    return args, values


def load_file(
    path: Path,
    sections: Mapping[str, Section],
    presets: Path | None = None,
    _seen: tuple[Path, ...] = (),
) -> Values:
    """Read a YAML file and the files its `base` names, nearest last.

    Where the file of a `base` is not there, `NAME`, `NAME.yaml` and `configs/NAME.yaml` mean the
    one in the folder `presets`; `NAME` is NAME.yaml beside the file first.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown section, key or type.
    """
    if not path.is_file():
        known = sorted(p.stem for p in presets.glob("*.yaml")) if presets else []
        named = f"{nearest_hint(path.stem, known)} Presets" if known else "Presets"
        raise ConfigError(f"{path}: no such config file. {named} lie in configs/.")
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: its `base` leads back to itself.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "not a YAML file"
        raise ConfigError(f"{path}: {what}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections ({', '.join(sections)}), got {content!r}.")
    base = content.pop("base", None)
    values: Values = {}
    if base is not None:
        file = file_or_preset(path.parent, str(base), presets)
        values = load_file(file, sections, presets, (*_seen, path.resolve()))
    return merge(values, check_values_by_section(content, sections, str(path)))


def file_or_preset(folder: Path, name: str, presets: Path | None) -> Path:
    """Return the file that a name means, seen from a folder; see `load_file`."""
    file = folder / name
    if presets is None or file.is_file() or Path(name).parent.as_posix() not in (".", "configs"):
        return file
    own = folder / f"{name}.yaml"
    preset = presets / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return next((path for path in (own, preset) if path.is_file()), file)


def check_values_by_section(
    content: Mapping[str, Any], sections: Mapping[str, Section], source: str
) -> Values:
    """Check section and key names and coerce the values of a nested mapping.

    Raises:
        ConfigError: a name is unknown or a value has another type; `source` is named.
    """
    values: Values = {}
    for title, entries in content.items():
        if title not in sections:
            raise ConfigError(
                f"{source}: unknown section '{title}'. {nearest_hint(str(title), list(sections))}"
            )
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{source}: section '{title}' needs options below it.")
        hints = typing.get_type_hints(sections[title])
        former = {
            f.metadata["alias"].lstrip("-"): f.name
            for f in dataclasses.fields(sections[title])
            if f.metadata["alias"]
        }
        for given_name, value in entries.items():
            name = former.get(given_name, given_name)
            if name not in hints:
                raise ConfigError(
                    f"{source}: unknown option '{title}.{name}'. "
                    f"{nearest_hint(str(name), list(hints))}"
                )
            coerced = coerce(value, hints[name], f"{source}: {title}.{name}")
            values.setdefault(title, {})[name] = coerced
    return values


def merge(*layers: Mapping[str, Mapping[str, Any]]) -> Values:
    """Merge values by section; later layers win."""
    merged: Values = {}
    for layer in layers:
        for title, entries in layer.items():
            merged.setdefault(title, {}).update(entries)
    return merged


def to_yaml(config: Any) -> str:
    """Write a dataclass of sections as YAML that `load_file` reads back."""
    plain = {
        title: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
        for title, section in dataclasses.asdict(config).items()
    }
    return str(yaml.safe_dump(plain, sort_keys=False))


def changed_options(config: Any) -> list[str]:
    """Return `name=value` for every option that differs from its default."""
    changed = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for f in dataclasses.fields(values):
            value = getattr(values, f.name)
            if f.default is not MISSING and value != f.default:
                changed.append(f"{f.name}={value}")
    return changed
