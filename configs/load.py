"""Options in layers: default < base < file < those given on top -> Config."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from configs.options import Section, check_names
from configs.schema import AUGMENTATIONS, AUGMENTED, LOCATIONS, SECTIONS, Config
from util.errors import ConfigError, brief, nearest_hint
from util.yaml_files import read_yaml

T = TypeVar("T")
Values = Mapping[str, Mapping[str, Any]]  # by section and name; of recipes also by theirs
Known = Mapping[str, Section | Mapping[str, Section]]  # classes by section; of recipes by theirs
PRESETS = Path(__file__).parent
AUTO = "auto"  # in place of a file: options that are not given are left to a plan of the data


@dataclass(frozen=True)
class Given:
    """Options as far as files and the command line give them; the others have their defaults.

    `values` holds them by section and name; its section "recipes" holds the options of each recipe
    by its name. `recipes` are the classes of those options, `dropped` names those that a command
    line leaves out. With `auto`, a plan of the data chooses the others.
    """

    values: Values = field(default_factory=dict)
    recipes: Mapping[str, Section] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    auto: bool = False

    @property
    def known(self) -> Known:
        """Return the classes of options by section, and those of the recipes by theirs."""
        return {**SECTIONS, "recipes": self.recipes}

    def on(self, below: "Given") -> "Given":
        """Return these options on top of others.

        A data location replaces every location below it, a preset of augmentation its parts, a
        recipe its alternatives; `no_tile` leaves out how images are cut.
        """
        data = self.values.get("data", {})
        replaced = set(LOCATIONS if any(name in data for name in LOCATIONS) else ())
        replaced |= set(AUGMENTED if "augment" in data else ())
        values = {title: dict(entries) for title, entries in below.values.items()}
        if "cls_loss" in self.values.get("loss", {}):
            values.get("model", {}).pop("scores", None)
        if self.values.get("tiles", {}).get("tile") is False:
            values.pop("tiles", None)
        values["data"] = {k: v for k, v in values.get("data", {}).items() if k not in replaced}
        if self.dropped:
            kept = {k: v for k, v in values.get("recipes", {}).items() if k not in self.dropped}
            values["recipes"] = kept
        merged = merge(values, self.values, self.recipes)
        return replace(self, values=merged, auto=self.auto or below.auto)

    def saved(self, content: Mapping[str, Any], source: str) -> "Given":
        """Return the options that a checkpoint holds; see `check_sections`."""
        return Given(check_sections(content, self.known, f"options in {source}"), self.recipes)

    def config(self) -> Config:
        """Return the options of a run; `augment` gives those it sets.

        Raises:
            ConfigError: a value is out of range, or two options contradict each other.
        """
        data = self.values.get("data", {})
        preset = AUGMENTATIONS.get(data.get("augment", "official"), {})
        values = {**self.values, "data": {**preset, **data}, **self._of_scores()}
        sections = {title: kind(**values.get(title, {})) for title, kind in SECTIONS.items()}
        options = {k: self.recipes[k](**v) for k, v in values.get("recipes", {}).items()}
        for switch, names in alternatives_of(self.recipes).items():
            if len(several := [name for name in options if name in names]) > 1:
                raise ConfigError(
                    f"recipes: {' and '.join(several)} exclude each other. "
                    f"Choose one by `{switch}`."
                )
        active = {k: v for k, v in options.items() if getattr(v, "active", True)}
        return Config(**sections, recipes=active)

    def _of_scores(self) -> Values:
        """Return the sections that say what scores are, each in agreement with the other."""
        model, loss = self.values.get("model", {}), self.values.get("loss", {})
        if "softmax" not in (model.get("scores"), loss.get("cls_loss")):
            return {"model": model, "loss": loss}
        detr = {"cls_loss": "softmax", "match_cost": "probability", "set_cost_class": 1.0}
        return {"model": {"scores": "softmax", **model}, "loss": {**detr, **loss}}

    def section(self, title: str, kind: type[T]) -> T:
        """Return the options of one section.

        Raises:
            ConfigError: a value is out of range, or two options contradict each other.
        """
        return kind(**self.values.get(title, {}))


def read_options(
    file: str | None, values: Values, recipes: Mapping[str, Section] | None = None
) -> Given:
    """Return options on top of those of a preset or file; "auto" leaves the others to a plan.

    Raises:
        ConfigError: see `load_file`.
    """
    given = Given(values, recipes or {})
    if not file or file == AUTO:
        return replace(given, auto=file == AUTO)
    path = file_or_preset(Path(), file, PRESETS)
    below = load_file(path, given.known, PRESETS)
    auto = below.pop("base", None) == AUTO
    return given.on(Given(below, auto=auto))


def load_file(
    path: Path, known: Known, presets: Path | None = None, _seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Read a YAML file and the files its `base` names, nearest last.

    Where the file of a `base` is not there, `NAME`, `NAME.yaml` and `configs/NAME.yaml` mean the
    one in the folder `presets`; `NAME` is NAME.yaml beside the file first. A `base` of "auto" is
    no file: it stays in what is returned.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown section, key or type.
    """
    where = f"config file {path}"
    if not os.path.isfile(path):  # which a name of any length or kind may be asked
        names = sorted(p.stem for p in presets.glob("*.yaml")) if presets else []
        hint = f"{nearest_hint(path.stem, names)} " if names else ""
        raise ConfigError(f"{where}: no such file. {hint}Presets are in configs/.")
    if path.resolve() in _seen:
        raise ConfigError(f"{where}: its `base` leads back to itself. Change it.")
    try:
        content = read_yaml(path) or {}
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "not a YAML file"
        raise ConfigError(f"{where}: {what}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{where}: must hold sections ({', '.join(known)}), not {brief(content)}."
        )
    base = content.pop("base", None)
    below: dict[str, Any] = {}
    if base == AUTO:
        below = {"base": AUTO}
    elif base is not None:
        file = file_or_preset(path.parent, str(base), presets)
        below = load_file(file, known, presets, (*_seen, path.resolve()))
    return merge(below, check_sections(content, known, where), known.get("recipes"))


def file_or_preset(folder: Path, name: str, presets: Path | None) -> Path:
    """Return the file that a name means, seen from a folder; see `load_file`."""
    file = folder / name
    if presets is None or Path(name).parent.as_posix() not in (".", "configs"):
        return file
    preset = presets / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    candidates = (file, folder / f"{name}.yaml", preset)
    return next((path for path in candidates if os.path.isfile(path)), file)


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


def alternatives_of(recipes: Any) -> Mapping[str, tuple[str, ...]]:
    """Return, by the option that chooses, the names of recipes of which a run has one at most."""
    alternatives: Mapping[str, tuple[str, ...]] = getattr(recipes, "alternatives", {})
    return alternatives


def owners_of(option: str, recipes: Mapping[str, Section]) -> list[str]:
    """Return the names of the recipes that have an option, or a switch by its negative form."""
    names = (option, option.removeprefix("no_"))
    return [
        recipe
        for recipe in recipes
        if any(f.name in names for f in dataclasses.fields(recipes[recipe]))
    ]


def choose_recipes(
    recipes: Mapping[str, Section],
    *,
    names: Sequence[str] | None,
    switches: Mapping[str, str | None],
    options: Sequence[str],
    present: Sequence[str] = (),
) -> tuple[list[str], frozenset[str]]:
    """Return the recipes that options choose, and those of a file that they leave out.

    `names` are chosen by name and leave out all others. Each of `switches` chooses one of its
    alternatives, or "none" of them. One of `options` chooses the recipe that it belongs to, unless
    several have it or one that has is `present` already.

    Raises:
        ConfigError: a name is unknown.
    """
    chosen, dropped = [*(names or ())], set[str](recipes if names is not None else ())
    for switch, alternatives in alternatives_of(recipes).items():
        if name := switches.get(switch):
            if name not in ("none", *alternatives):
                raise ConfigError(
                    f"{switch}: must be one of none, {', '.join(alternatives)}, not "
                    f"{brief(name)}. {nearest_hint(name, alternatives)}"
                )
            dropped.update(alternatives)
            chosen += [name] if name != "none" else []
    check_sections({"recipes": dict.fromkeys(chosen)}, {"recipes": recipes}, "command line")
    for option in options:
        known = {name: recipes[name] for name in chosen}
        known |= {name: recipes[name] for name in present if name not in dropped}
        if not owners_of(option, known) and len(owners := owners_of(option, recipes)) == 1:
            chosen.append(owners[0])
    return list(dict.fromkeys(chosen)), frozenset(dropped - {*chosen})


def merge(
    below: Mapping[str, Any], above: Mapping[str, Any], recipes: Any = None
) -> dict[str, Any]:
    """Merge nested mappings; the second wins. Its `recipes` replace their alternatives."""
    merged = dict(below)
    for names in alternatives_of(recipes).values():
        if any(name in names for name in above.get("recipes", {})):
            kept = merged.get("recipes", {}).items()
            replaced = [n for n in names if n not in above["recipes"]]
            merged["recipes"] = {k: v for k, v in kept if k not in replaced}
    for name, value in above.items():
        nested = isinstance(value, Mapping) and name in merged
        merged[name] = merge(merged[name], value) if nested else value
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
