"""The options that are left to a plan: read the data, measure, choose, report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from configs.load import Given, read_options
from configs.schema import DataConfig, OptimConfig, RunConfig
from configs.tiles import TrainTileOptions
from datasets.build import load_index, seen_index
from engine.auto.choices import Measurement, Planner, SizeTrial
from engine.auto.facts import facts_of
from engine.auto.measure import machine_of, measure
from util.console import log
from util.errors import ConfigError
from util.files import read_regular
from util.main_process import from_main
from util.world import World

RECORD = "plan.json"  # in a run's folder
_LARGEST = 10_000_000  # bytes of a record
_PRESETS = {False: "finetune_small", True: "finetune_r50"}  # without a GPU, and with one
_NEEDED_BY = {  # switches of a preset that an option given as false takes along
    "two_stage": ("mixed_query_selection",),
    "with_box_refine": ("two_stage", "mixed_query_selection", "look_forward_twice"),
}
_FINE_RATES = {"lr": 5e-5, "lr_backbone": 5e-6}  # of a model that can detect already


def complete(
    given: Given, weights: Given, *, device: torch.device, world: World
) -> tuple[Given, str]:
    """Choose, in the main process for all, the options that a user leaves open; and their record.

    `weights` are the model options of the weights to start from; without any the model is that of a
    preset. The order of precedence is given, chosen, weights, preset. A measurement that an earlier
    start recorded in the run's folder is taken in place of a new one.

    Raises:
        ConfigError: neither hours nor epochs are given, or options contradict each other.
        DataError: the data cannot be used.
        UserError: an image does not fit into memory.
    """
    return from_main(world, lambda: make_plan(given, weights, device=device, processes=world.size))


def make_plan(
    given: Given, weights: Given, *, device: torch.device, processes: int
) -> tuple[Given, str]:
    """Choose the options of a run in `processes` processes; see `complete`."""
    optim, run = given.section("optim", OptimConfig), given.section("run", RunConfig)
    if not optim.max_hours and "epochs" not in given.values.get("optim", {}):
        raise ConfigError(
            "max_hours: is missing. A plan needs the hours that the run may take (or `epochs`)."
        )
    if not run.validate:
        raise ConfigError(
            "no_validate: a plan decides by validation data, too. Give some, or name a preset "
            "instead of `config auto`."
        )
    data = given.section("data", DataConfig)
    tiles = given.section("tiles", TrainTileOptions)
    if tiles.tile and tiles.tile_size is None:
        raise ConfigError(
            "tile_size: is missing. A plan chooses `eval_scale` by the size of tiles. Give it."
        )
    train, val = (
        seen_index(index, tiles, data.eval_scale, train=need_boxes)
        for need_boxes in (True, False)
        for index in [load_index(data, "train" if need_boxes else "val", need_boxes=need_boxes)]
    )
    facts, machine = facts_of(train, val), machine_of(device, processes)
    weights = Given(weights.values, given.recipes)  # its options stand on those of the preset
    name = _PRESETS[machine.gpu]
    preset = preset_options(name, given, weights)
    planner = Planner(
        facts=facts,
        machine=machine,
        preset=weights.on(preset).config(),
        given=_fixed(given, weights),
        hours=optim.max_hours or None,
        epochs=optim.epochs,
    )
    log.info(
        f"plan: {facts.images} images, {facts.boxes} boxes, at most {facts.most_boxes} in an "
        f"image; {device}"
    )
    draft = given.on(Given(planner.values)).on(weights).on(preset)
    tried = {section: entries for section, entries in draft.values.items() if section != "run"}
    basis = {"facts": asdict(facts), "machine": asdict(machine), "options": tried}
    measured = recorded(Path(run.output_dir) / RECORD, basis) if run.output_dir else None
    if measured is None:
        log.info("measuring a few steps of images of two sizes")
        measured = measure(draft.config(), train, val, device)
    planner = replace(planner, measured=measured)
    lines = [*_first_lines(name, preset, given, weights), *(c.line() for c in planner.choices)]
    for line in lines:
        log.info(f"  {line}")
    notices = list(planner.notices())
    for notice in notices:
        log.warning(notice)
    options = Given(planner.values).on(weights).on(preset)
    given.on(options).config()  # accepted, or an error before the run begins
    return options, record_of(basis, measured, lines, notices)


def preset_options(name: str, given: Given, weights: Given) -> Given:
    """Return the options of a preset without what others given or weights rule out."""
    values = {
        section: dict(entries)
        for section, entries in read_options(name, {}, given.recipes).values.items()
    }
    for switch, more in _NEEDED_BY.items():
        if given.values.get("model", {}).get(switch) is False:
            for option in more:
                values["model"].pop(option, None)
    if weights.values.get("model"):
        del values["model"]
        values["optim"] |= _FINE_RATES
    return Given(values, given.recipes)


def _fixed(given: Given, weights: Given) -> Mapping[str, Mapping[str, Any]]:
    """Return the options that no choice may change: the model of weights, but for its queries."""
    model = {k: v for k, v in weights.values.get("model", {}).items() if k != "num_queries"}
    return {**given.values, "model": {**model, **given.values.get("model", {})}}


def _first_lines(name: str, preset: Given, given: Given, weights: Given) -> list[str]:
    """Return the choices of the model and its recipes."""
    why = "no GPU: a small model" if name == _PRESETS[False] else "a GPU: ResNet-50"
    lines = [f"preset {name}: {why}"]
    if weights.values.get("model"):
        rates = ", ".join(f"{k} {v:g}" for k, v in _FINE_RATES.items())
        lines = [f"model as `finetune` has it, {rates}: it can detect already"]
    of_preset = " ".join(preset.values.get("recipes", {}))
    if recipes := given.values.get("recipes", {}):
        lines.append(f"recipes {' '.join(recipes)} (given): as given")
    elif of_preset:
        lines.append(f"recipes {of_preset}: helps in short trainings (docs/recipes.md)")
    else:
        lines.append("recipes none: the preset has none (docs/recipes.md)")
    return lines


def record_of(
    basis: Mapping[str, Any], measured: Measurement, lines: Sequence[str], notices: Sequence[str]
) -> str:
    """Return JSON of what was measured, on which basis, and of what was chosen."""
    content = {"basis": basis, "measured": asdict(measured), "choices": lines, "notices": notices}
    return json.dumps(content, indent=1)


def recorded(path: Path, basis: Mapping[str, Any]) -> Measurement | None:
    """Return the measurement of a record with the same basis; None if there is none, or damaged."""
    try:
        content = json.loads(read_regular(path, _LARGEST))
        if content["basis"] != json.loads(json.dumps(basis)):
            return None
        measured = content["measured"]
        small, large = (SizeTrial(**trial) for trial in measured.pop("trials"))
        found = Measurement((small, large), **measured)
        numbers = [*vars(small).values(), *vars(large).values(), *measured.values()]
        sound = all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if sound and 0 < small.pixels < large.pixels and large.seconds > 0 else None
