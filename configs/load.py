"""Options from files and the command line: default < base < file < command line -> Config."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from configs.options import OptionParser, Section, check_names
from configs.schema import AUGMENTATIONS, AUGMENTED, LOCATIONS, SECTIONS, Config
from util.errors import ConfigError, nearest_hint

T = TypeVar("T")
Values = Mapping[str, Mapping[str, Any]]  # by section and name; of recipes also by theirs
Known = Mapping[str, Section | Mapping[str, Section]]  # classes by section; of recipes by theirs
PRESETS = Path(__file__).parent


@dataclass(frozen=True)
class Given:
    """Options as far as files and the command line give them; the others have their defaults.

    `values` holds them by section and name; its section "recipes" holds the options of each recipe
    by its name. `recipes` are the classes of those options. `chosen` names the recipes of a command
    line that says which ones a run has.
    """

    values: Values = field(default_factory=dict)
    recipes: Mapping[str, Section] = field(default_factory=dict)
    chosen: tuple[str, ...] | None = None

    @property
    def known(self) -> Known:
        """Return the classes of options by section, and those of the recipes by theirs."""
        return {**SECTIONS, "recipes": self.recipes}

    def on(self, below: "Given") -> "Given":
        """Return these options on top of others.

        A data location replaces every location below it, a preset of augmentation its parts, and
        chosen recipes those that are not chosen.
        """
        data = self.values.get("data", {})
        replaced = set(LOCATIONS if any(name in data for name in LOCATIONS) else ())
        replaced |= set(AUGMENTED if "augment" in data else ())
        values = {title: dict(entries) for title, entries in below.values.items()}
        values["data"] = {k: v for k, v in values.get("data", {}).items() if k not in replaced}
        if self.chosen is not None:
            recipes = values.get("recipes", {})
            values["recipes"] = {k: v for k, v in recipes.items() if k in self.chosen}
        return replace(self, values=merge(values, self.values))

    def saved(self, content: Mapping[str, Any], source: str) -> "Given":
        """Return the options that a checkpoint holds; see `check_sections`."""
        return Given(check_sections(content, self.known, source), self.recipes)

    def config(self) -> Config:
        """Return the options of a run; see `build_config`."""
        return build_config(self.values, self.recipes)

    def section(self, title: str, kind: type[T]) -> T:
        """Return the options of one section.

        Raises:
            ConfigError: a value is out of range, or two options contradict each other.
        """
        return kind(**self.values.get(title, {}))


def build_config(values: Values, recipes: Mapping[str, Section] | None = None) -> Config:
    """Return the options of a run from values by section; `augment` gives those it sets.

    Raises:
        ConfigError: a value is out of range, or two options contradict each other.
    """
    data = values.get("data", {})
    preset = AUGMENTATIONS.get(data.get("augment", "official"), {})
    values = {**values, "data": {**preset, **data}}
    sections = {title: kind(**values.get(title, {})) for title, kind in SECTIONS.items()}
    options = {k: (recipes or {})[k](**v) for k, v in values.get("recipes", {}).items()}
    return Config(**sections, recipes=options)


def read_options(
    file: str | None, values: Values, recipes: Mapping[str, Section] | None = None
) -> Given:
    """Return options on top of those of a preset or file.

    Raises:
        ConfigError: see `load_file`.
    """
    given = Given(values, recipes or {})
    if not file:
        return given
    path = file_or_preset(Path(), file, PRESETS)
    return given.on(Given(load_file(path, given.known, PRESETS)))


def read_command_line(
    parser: OptionParser, argv: Sequence[str], recipes: Mapping[str, Section] | None
) -> Given:
    """Return the options of a command line.

    With `recipes`, the classes of recipes' options by name, options may come from a file too, and
    the flags of those recipes are known that the file or --recipes names.

    Raises:
        ConfigError: see `OptionParser.parse_options` and `load_file`.
    """
    if recipes is None:
        return Given(parser.parse_options(argv)[1])
    parser.add_argument("--config", metavar="FILE", help="preset or YAML file of options")
    what = f"training recipes to use: {', '.join(recipes)}"
    parser.add_argument("--recipes", metavar="NAME", nargs="*", help=what)
    if {"-h", "--help", "--help_all"}.isdisjoint(argv):
        args, _ = parser.parse_known_args(argv)
        file = read_options(args.config, {}, recipes)
        # in the order given: that of the model's parts, the same in every process of a run
        names = dict.fromkeys([*file.values.get("recipes", {}), *(args.recipes or ())])
        check_sections({"recipes": names}, {"recipes": recipes}, "command line")
    else:
        names, file = dict.fromkeys(recipes), Given()
    for name in sorted(names):
        parser.add_section(f"recipe {name}", recipes[name])
    args, values = parser.parse_options(argv, recipes)
    chosen = None if args.recipes is None else tuple(args.recipes)
    for name in names:
        options = values.pop(f"recipe {name}", {})
        if options or name in (chosen or ()):
            values.setdefault("recipes", {})[name] = options
    return Given(values, recipes, chosen).on(file)


def load_file(
    path: Path, known: Known, presets: Path | None = None, _seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Read a YAML file and the files its `base` names, nearest last.

    Where the file of a `base` is not there, `NAME`, `NAME.yaml` and `configs/NAME.yaml` mean the
    one in the folder `presets`; `NAME` is NAME.yaml beside the file first.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown section, key or type.
    """
    if not path.is_file():
        names = sorted(p.stem for p in presets.glob("*.yaml")) if presets else []
        hint = f"{nearest_hint(path.stem, names)} " if names else ""
        raise ConfigError(f"{path}: no such config file. {hint}Presets are in configs/.")
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: its `base` leads back to itself.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "not a YAML file"
        raise ConfigError(f"{path}: {what}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections ({', '.join(known)}), not {content!r}.")
    base = content.pop("base", None)
    below: dict[str, Any] = {}
    if base is not None:
        file = file_or_preset(path.parent, str(base), presets)
        below = load_file(file, known, presets, (*_seen, path.resolve()))
    return merge(below, check_sections(content, known, str(path)))


def file_or_preset(folder: Path, name: str, presets: Path | None) -> Path:
    """Return the file that a name means, seen from a folder; see `load_file`."""
    file = folder / name
    if presets is None or file.is_file() or Path(name).parent.as_posix() not in (".", "configs"):
        return file
    own = folder / f"{name}.yaml"
    preset = presets / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return next((path for path in (own, preset) if path.is_file()), file)


def check_sections(
    content: Mapping[str, Any], known: Known, source: str, within: str = ""
) -> dict[str, Any]:
    """Check the names of sections (`within` recipes, those of recipes) and options; coerce values.

    Raises:
        ConfigError: a name is unknown or a value has another type; `source` is named.
    """
    values: dict[str, Any] = {}
    for title, entries in content.items():
        what = f"{'recipe' if within else 'section'} '{title}'"
        if title not in known:
            hint = nearest_hint(str(title), list(known))
            raise ConfigError(f"{source}: unknown {what}. {hint}")
        if not isinstance(entries, Mapping | None):
            raise ConfigError(f"{source}: {what} needs options below it.")
        section, prefix = known[title], f"{within}{title}."
        if isinstance(section, Mapping):
            values[title] = check_sections(entries or {}, section, source, prefix)
        else:
            values[title] = check_names(entries or {}, section, f"{source}: ", prefix)
    return {title: entries for title, entries in values.items() if entries or within}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the second wins."""
    merged = dict(below)
    for name, value in above.items():
        nested = isinstance(value, Mapping) and name in below
        merged[name] = merge(below[name], value) if nested else value
    return merged


def to_yaml(config: Any) -> str:
    """Write a dataclass of sections as YAML that `load_file` reads back."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # lists in place of tuples
    return str(yaml.safe_dump(plain, sort_keys=False))


def changed_options(config: Any) -> list[str]:
    """Return the chosen recipes, and `name=value` for every option that is not its default."""
    changed: list[str] = []
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if not is_dataclass(value) and value:
            changed.append(f"{part.name}={' '.join(value)}")
        for section in [value] if is_dataclass(value) else value.values():
            changed += [
                f"{f.name}={getattr(section, f.name)}"
                for f in dataclasses.fields(section)
                if getattr(section, f.name) != f.default
            ]
    return changed
