"""A command's line: its flags, which are derived from the fields of options, and their help.

A command is a module with `SECTIONS`, the classes of its options by title, and a function `main`
that takes some of them, a `Config` or a `Given`. It may have more tables:

- `RECIPES`: the classes of recipes' options by name. Options then come from a file, too.
- `RELEVANT`: names by section. Of these sections, `--help` lists no other option.
- `DEFAULTS`: what the help says of every default in a section, instead of each field's own.
- `AUTO`: true where options may be left to a plan of the data, by `--config auto`.
"""

import argparse
import dataclasses
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from configs.load import Given, alternatives_of, choose_recipes, owners_of, read_options
from configs.options import METAVARS, Section, by_section, parts_of
from configs.other_names import unknown_hint
from configs.schema import SECTIONS, Config
from util.errors import ConfigError

_FLAG = re.compile(r"^--([A-Za-z][\w-]*)")


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Return a command line whose flags are spelled with `_`, as ours are, where it has `-`."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_FLAG.sub(lambda m: f"--{m[1].replace('-', '_')}", word) for word in argv[:end]] + [
        *argv[end:]
    ]


class OptionParser(argparse.ArgumentParser):
    """A parser of flags that are derived from fields; it reports an error in one line."""

    def __init__(self, *, all_help: bool = False, **kwargs: Any) -> None:
        super().__init__(
            usage="%(prog)s [options]",
            allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=32),
            **kwargs,
        )
        self.all_help, self.hidden, self.foreign = all_help, 0, False
        self.sections: dict[str, Section] = {}
        self.add_argument("--help_all", action="help", help="list every option, rare ones too")
        self.add_argument("--debug", action="store_true", help="show a traceback on user errors")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as ConfigError."""
        raise ConfigError(f"command line: {message}. --help lists the options.")

    def add_section(
        self,
        title: str,
        section: Section,
        *,
        relevant: Collection[str] | None = None,
        default: str | None = None,
    ) -> None:
        """Add one flag for each field of a section; only flags that are given are set.

        --help leaves out rare options and those that are not `relevant`. It states `default`, if
        that is given, for every option.
        """
        self.sections[title] = section
        group = self.add_argument_group(title)
        hints = typing.get_type_hints(section)
        for f in dataclasses.fields(section):
            foreign = relevant is not None and f.name not in relevant
            hidden = (f.metadata["rare"] or foreign) and not self.all_help
            self.hidden += hidden
            self.foreign |= hidden and foreign
            self._add_flag(group, f, hints[f.name], default, hidden=hidden)

    def _add_flag(
        self,
        group: Any,
        f: "dataclasses.Field[Any]",
        annotation: Any,
        default: str | None,
        *,
        hidden: bool,
    ) -> None:
        kind, choices, several, _ = parts_of(annotation)
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default

        def help(text: str) -> str:
            if default is not None:
                text = f"{text.partition(' (default')[0]} (default: {default})"
            elif kind is not bool and shown not in (None, ""):
                text += f" (default: {shown})"
            return argparse.SUPPRESS if hidden else text.replace("%", "%%")

        flags = [f"--{name}" for name in (f.name, f.metadata["alias"]) if name]
        text, common = f.metadata["help"], {"dest": f.name, "default": argparse.SUPPRESS}
        if kind is bool:  # the help lists the flag that changes something
            on, off = help(text), help(f.metadata["off"] or f"without {text}")
            on, off = (argparse.SUPPRESS, off) if f.default else (on, argparse.SUPPRESS)
            group.add_argument(*flags, action="store_true", help=on, **common)
            group.add_argument(f"--no_{f.name}", action="store_false", help=off, **common)
        else:
            common["metavar"] = "|".join(map(str, choices)) or METAVARS[kind]
            group.add_argument(*flags, nargs="*" if several else None, help=help(text), **common)

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
            of_train = any(hasattr(section, name.lstrip("-")) for section in SECTIONS.values())
            hint = unknown_hint(
                name,
                self.flags,
                "--help_all lists the options.",
                elsewhere="It is an option of main.py train." if of_train else "",
            )
            if owners := owners_of(name.lstrip("-"), recipes or {}):
                hint = f"It is an option of a recipe: add --recipes {' or '.join(owners)}."
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
            why = "are rarely used or have no effect here" if self.foreign else "are rarely used"
            self.epilog = f"--help_all lists {self.hidden} more options, which {why}."
        return super().format_help()


def read_command_line(parser: OptionParser, command: Any, argv: Sequence[str]) -> Given:
    """Return the options of a command line, after adding the command's flags to a parser.

    A recipe is chosen by --recipes, by the option of its alternatives, by the file of a run, or by
    an option that no other recipe has.

    Raises:
        ConfigError: see `OptionParser.parse_options` and `load_file`.
    """
    relevant, defaults = getattr(command, "RELEVANT", {}), getattr(command, "DEFAULTS", {})
    for title, section in command.SECTIONS.items():
        parser.add_section(
            title, section, relevant=relevant.get(title), default=defaults.get(title)
        )
    recipes: Mapping[str, Section] | None = getattr(command, "RECIPES", None)
    if recipes is None:
        return Given(parser.parse_options(argv)[1])
    may_be_auto = getattr(command, "AUTO", False)
    _add_file_and_recipes(parser, recipes, may_be_auto=may_be_auto)
    dropped: frozenset[str] = frozenset()
    names, chosen, file = list(recipes), list[str](), Given()
    if {"-h", "--help", "--help_all"}.isdisjoint(argv):
        args, unknown = parser.parse_known_args(argv)
        file = read_options(args.config, {}, recipes)
        if file.auto and not may_be_auto:
            raise ConfigError(
                "config auto: works with `train` and `plan` only. Write the options to a file with "
                "`plan --output FILE`, and give that file."
            )
        names = list(file.values.get("recipes", {}))
        chosen, dropped = choose_recipes(
            recipes,
            names=args.recipes,
            switches={switch: getattr(args, switch) for switch in alternatives_of(recipes)},
            options=[word.partition("=")[0].lstrip("-") for word in unknown if word[:2] == "--"],
            present=names,
        )
        # in the order given: that of the model's parts, the same in every process of a run
        names += [name for name in chosen if name not in names]
    for name in sorted(names):
        parser.add_section(f"recipe {name}", recipes[name], relevant=relevant.get("recipes"))
    args, values = parser.parse_options(argv, recipes)
    for name in names:
        options = values.pop(f"recipe {name}", {})
        if options or name in chosen:
            values.setdefault("recipes", {})[name] = options
    return Given(values, recipes, dropped).on(file)


def _add_file_and_recipes(
    parser: OptionParser, recipes: Mapping[str, Section], *, may_be_auto: bool
) -> None:
    """Add the flags that name a file of options, and recipes."""
    auto = "; auto: those that are not given fit the data, this machine and --max_hours"
    text = "preset or YAML file of options" + auto * may_be_auto
    parser.add_argument("--config", metavar="FILE", help=text)
    text = f"training recipes to use: {', '.join(recipes)}"
    parser.add_argument("--recipes", metavar="NAME", nargs="*", help=text)
    for switch, names in alternatives_of(recipes).items():
        text, choices = f"one of these recipes: {', '.join(names)}", ("none", *names)
        parser.add_argument(f"--{switch}", choices=choices, metavar="|".join(choices), help=text)


def arguments(command: Any, given: Given) -> dict[str, Any]:
    """Build the options that a command's `main` takes, by the types of its parameters."""
    hints = typing.get_type_hints(command.main)
    titles = {section: title for title, section in command.SECTIONS.items()}
    built = {name: given.section(titles[t], t) for name, t in hints.items() if t in titles}
    built |= {name: given.config() for name, t in hints.items() if t is Config}
    return built | {name: given for name, t in hints.items() if t is Given}


def with_dashes(message: str, flags: Collection[str], *, about_option: bool) -> str:
    """Write the options that an error names as `flags`: `name` and `name value` in backticks.

    `about_option`: one may be at the beginning, too, as in `name:` and `name value:`.
    """

    def flag(match: "re.Match[str]") -> str:
        return f"--{match[1]}{match[2]}" if f"--{match[1]}" in flags else match[0]

    message = re.sub(r"`(\w+)((?: [^`]*)?)`", flag, message)
    # of a config file it is what it holds that is wrong, not the option
    beginning = r"^(\w+)(?! file )((?: .*?)?)(?=: )"
    return re.sub(beginning, flag, message, flags=re.DOTALL) if about_option else message
