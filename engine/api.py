"""`train` and `evaluate` in one call each, as the commands do it."""

import json
import os
import signal
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from configs.load import AUTO, Given, alternatives_of, choose_recipes, read_options
from configs.options import by_section
from configs.schema import SECTIONS
from engine.commands import train as command
from engine.detector import Detector
from engine.plan import forget_saved_run
from engine.processes import launch
from util.console import show_messages
from util.distributed import rank_at_start, started_by_launcher
from util.errors import UserError

_ROOT = Path(__file__).parents[1]
_INSTALLED = _ROOT / "__main__.py"  # of the package; a checkout has main.py


def train(config: str | os.PathLike[str] | None = None, **options: Any) -> Path:
    """Train a detector as the command `train` does; return the run's folder.

    `config` is the name of a preset or a YAML file. `options` are those of the command line
    without dashes (`lr=1e-4, train_images="train/", output_dir="runs/mine"`), a list for several
    values; `recipes` names recipes. With `gpus`, the run computes in separate processes.

    Raises:
        UserError: an option is unknown (the nearest one is named) or of another type, or the
            command would end with such an error.
        KeyboardInterrupt: Ctrl-C stopped the run, after it was saved. In a thread, signals are left
            to the program.
    """
    given = _given(os.fspath(config) if config is not None else None, options)
    show_messages(rank_at_start())
    run = command.processes(given)
    if run.gpus > 1 and not started_by_launcher():
        forget_saved_run()  # the processes read the checkpoint themselves
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "options.yaml"
            plain = json.loads(json.dumps(given.values))  # lists in place of tuples
            if given.auto:
                plain["base"] = AUTO
            file.write_text(yaml.safe_dump(plain), encoding="utf-8")
            code = launch(
                _INSTALLED if _INSTALLED.is_file() else _ROOT / "main.py",
                ["train", "--config", str(file)],
                processes=run.gpus,
                device=run.device,
                restarts=run.max_restarts,
            )
    else:
        code = command.main(given)
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt("the run was stopped and saved")
    if code:
        raise UserError(f"training ended with exit code {code}; the reason is printed above.")
    return Path(run.output_dir)


def _given(config: str | None, options: dict[str, Any]) -> Given:
    """Return the options of a call on top of those of a preset or file."""
    recipes = command.RECIPES
    names = options.pop("recipes", None)
    switches = {switch: options.pop(switch, None) for switch in alternatives_of(recipes)}
    file = read_options(config, {}, recipes)
    plain = {f.name for section in SECTIONS.values() for f in fields(section)}
    present = list(file.values.get("recipes", {}))
    chosen, dropped = choose_recipes(
        recipes,
        names=(names,) if isinstance(names, str) else names,
        switches=switches,
        options=[name for name in options if name not in plain],
        present=present,
    )
    sections = {f"recipe {name}": recipes[name] for name in [*present, *chosen]}
    values = by_section(options, {**SECTIONS, **sections})
    own = {title: values.pop(title) for title in sections if title in values}
    values["recipes"] = {name: {} for name in chosen}
    for title, entries in own.items():
        values["recipes"][title.removeprefix("recipe ")] = entries
    return Given(values, recipes, dropped).on(file)


def evaluate(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    *,
    batch_size: int | None = None,
    precision: str = "fp32",
    **load: Any,
) -> dict[str, float]:
    """Return COCO's 12 numbers of a checkpoint by name.

    `load` holds options of `Detector.load`; the others are those of `Detector.evaluate`.
    """
    detector = Detector.load(source, **load)
    return detector.evaluate(images, annotations, batch_size=batch_size, precision=precision)
