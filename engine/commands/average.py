"""`main.py average`: the mean of the weights of several checkpoints, as one more checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.load import Given
from configs.options import Checked, option
from engine.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint
from engine.detector import saved_options
from models.recipes import KnownRecipes
from models.weights.average import Mean
from models.weights.load import Pretrained, load_pretrained
from util.console import console
from util.errors import CheckpointError, ConfigError, brief
from util.files import refuse_overwriting

_KEPT = ("classes", "config", "preprocessing", "thresholds", "versions")  # of the newest


@dataclass(frozen=True, kw_only=True)
class AverageOptions(Checked):
    """Which checkpoints are averaged, and where the result goes."""

    checkpoints: tuple[str, ...] = option((), "checkpoints of one model, at least two")
    output_dir: str = option("", "folder of a run, whose newest checkpoints are taken")
    last: int = option(5, "checkpoints to take from --output_dir", low=2, most=10000)
    output: str = option("", "file to write (default: average.pth in --output_dir)")
    ema: bool = option(
        True,
        "average the moving averages of checkpoints that have them",
        off="average the trained weights, even of checkpoints with moving averages",
    )


SECTIONS = {"average": AverageOptions}


def main(options: AverageOptions) -> int:
    """Write the mean of the weights of several checkpoints."""
    paths = chosen(options)
    output = Path(options.output or Path(options.output_dir) / "average.pth")
    refuse_overwriting(paths, [output])
    content = average(paths, ema=options.ema)
    save_checkpoint(output, content)
    steps = ", ".join(str(step) for step in content["averaged"]["steps"])
    console(f"written: {output}, the mean of {len(paths)} checkpoints (steps {steps})")
    return 0


def chosen(options: AverageOptions) -> list[Path]:
    """Return the checkpoints that options name.

    Raises:
        ConfigError: they name none, or both ways of naming them are used.
        CheckpointError: the folder has too few.
    """
    if bool(options.checkpoints) == bool(options.output_dir):
        raise ConfigError(
            "average: give either `checkpoints FILE ...` with `output FILE`, or `output_dir RUN`."
        )
    if options.output_dir:
        paths = CheckpointFolder(Path(options.output_dir), keep=1).newest(options.last)
        if len(paths) < options.last:
            found = f"{len(paths)} checkpoint{'' if len(paths) == 1 else 's'}"
            raise CheckpointError(
                f"{options.output_dir}: has {found} of its run, not {options.last}. Take fewer "
                f"with `last`, or train with --keep_checkpoints {options.last}."
            )
        return paths
    if not options.output:
        raise ConfigError("output: is missing. Name the file to write.")
    paths = list(dict.fromkeys(map(Path, options.checkpoints)))
    if len(paths) < 2:
        raise ConfigError("checkpoints: needs at least two different files.")
    return paths


def average(paths: Sequence[Path], *, ema: bool) -> dict[str, Any]:
    """Return the content of a checkpoint whose weights are the mean of several; see `Mean`.

    The rest is that of the newest, the one with the most steps: classes, options, preprocessing
    and thresholds. What continues a run is left out. `ema` takes the moving averages of
    checkpoints that have them.

    Raises:
        CheckpointError: a file is no checkpoint of a run, or they are of different models.
    """
    steps = {path: load_checkpoint(path)["progress"]["step"] for path in paths}
    ordered = sorted(paths, key=lambda path: steps[path])
    mean = Mean()
    for path in ordered:  # one at a time in memory
        content, weights = load_checkpoint(path), load_pretrained(str(path), ema=ema)
        own = _what_agrees(weights, str(path))
        own["moving averages"] = "present" if ema and content.get("ema") else "missing"
        if not mean.count:
            first = own
        _check_same(own, first, path)
        try:
            mean.add(weights.state_dict)
        except ValueError as error:
            raise CheckpointError(f"{path}: cannot be averaged: {error}. Leave it out.") from error
    return {
        "model": mean.state_dict(),
        **{key: content[key] for key in _KEPT if key in content},
        "averaged": {
            "steps": [steps[path] for path in ordered],
            "ema": first["moving averages"] == "present",
        },
    }


def _what_agrees(weights: Pretrained, source: str) -> dict[str, Any]:
    """Return all that must be the same, by a name that an error can show."""
    given = Given({}, KnownRecipes())
    config = asdict(saved_options(given, weights.config or {}, source).config())
    return {
        **{f"`{name}`": value for name, value in config["model"].items()},
        "recipes": config["recipes"],
        "category ids": weights.classes.texts or weights.classes.ids,
        "class names": weights.classes.names,
        "mean and deviation of images": (weights.image_mean, weights.image_std),
    }


def _check_same(own: Mapping[str, Any], first: Mapping[str, Any], path: Path) -> None:
    differing = [
        f"{name} {brief(own[name])}, others {brief(first[name])}"
        for name in own
        if own[name] != first[name]
    ]
    if differing:
        hint = " Use `no_ema`." if differing[0].startswith("moving") else ""
        raise CheckpointError(
            f"{path}: is of another model than the other checkpoints ({'; '.join(differing)}). "
            f"Average checkpoints of one run.{hint}"
        )
