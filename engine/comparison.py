"""What the logs of several runs say, side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from util.errors import DataError, brief
from util.html import render, svg
from util.json_lines import json_lines
from util.plot import finite, run_chart
from util.yaml_files import read_yaml

_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # as COCO orders them
_OF_PLACE = ("output_dir", "resume", "device", "gpus", "num_workers")  # change no result


@dataclass(frozen=True)
class Run:
    """A run's log: losses and COCO's numbers by epoch, counted from 1, and its options by name.

    The numbers are those of the averaged weights, where the run has some. `seconds` were spent
    training, without evaluations.
    """

    name: str
    epochs: int
    losses: dict[int, float]
    results: dict[int, dict[str, float]]
    seconds: float
    options: dict[str, Any]

    @property
    def best(self) -> int | None:
        """The epoch with the best AP, the first one of equals; None without an evaluation."""
        return max(self.results, key=lambda epoch: self.results[epoch]["AP"], default=None)


def read_run(folder: Path, name: str) -> Run:
    """Read `log.txt` and `config.yaml` of a run's folder.

    Raises:
        DataError: it is no such folder, or has no epoch yet.
    """
    try:
        entries = {
            entry["epoch"] + 1: entry  # the last line of an epoch counts
            for _, entry in json_lines(folder / "log.txt")
            if type(entry.get("epoch")) is int and entry["epoch"] >= 0
        }
    except OSError as error:
        raise DataError(
            f"{folder}: cannot read its log.txt ({error.strerror}). Give the folders of runs."
        ) from None
    if not entries:
        raise DataError(f"{folder}: its log.txt has no epoch yet. Leave this run out.")
    results = {}
    for epoch, entry in sorted(entries.items()):
        found = entry.get("ema_test_coco_eval_bbox", entry.get("test_coco_eval_bbox"))
        numbers = found[: len(_METRICS)] if isinstance(found, list) else []
        named = {
            name: v for name, v in zip(_METRICS, numbers, strict=False) if finite(v) and v >= 0
        }
        if "AP" in named:
            results[epoch] = named
    seconds = [e["train_seconds"] for e in entries.values() if finite(e.get("train_seconds"))]
    return Run(
        name=name,
        epochs=max(entries),
        losses={
            e: v["train_loss"] for e, v in sorted(entries.items()) if finite(v.get("train_loss"))
        },
        results=results,
        seconds=float(sum(seconds)),
        options=_options(folder / "config.yaml"),
    )


def _options(path: Path) -> dict[str, Any]:
    """Return a run's options by name, those of recipes as RECIPE.NAME; none without a file."""
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({brief(str(error))}). Check the file.") from None
    sections = content if isinstance(content, dict) else {}
    options: dict[str, Any] = {}
    for title, section in sections.items():
        for name, value in (section if isinstance(section, dict) else {}).items():
            if title == "recipes" and isinstance(value, dict):
                options |= {f"{name}.{key}": inner for key, inner in value.items()}
            else:
                options[str(name)] = value
    return options


def differing_options(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options in which runs differ, with the value of each run, "" where it has none."""
    names = dict.fromkeys(name for run in runs for name in run.options if name not in _OF_PLACE)
    shown = {
        name: ["" if name not in run.options else _shown(run.options[name]) for run in runs]
        for name in names
    }
    return {name: values for name, values in shown.items() if len(set(values)) > 1}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value[:20])) or "none"
    return "none" if value is None or value == "" else str(value)[:200]


def table(runs: Sequence[Run]) -> str:
    """Return the results as aligned text, the best run first."""
    width = max(len("run"), *(len(run.name) for run in runs))
    header = "".join(f"{name:>11}" for name in _METRICS)
    lines = [f"{'run':{width}}{'epochs':>8}{'best at':>9}{header}{'loss':>9}{'hours':>8}"]
    for run in ranked(runs):
        best = run.results[run.best] if run.best else {}
        numbers = [f"{best[name]:.3f}" if name in best else "n/a" for name in _METRICS]
        loss = f"{list(run.losses.values())[-1]:.3f}" if run.losses else "n/a"
        lines.append(
            f"{run.name:{width}}{run.epochs:>8}{run.best or 'n/a':>9}"
            + "".join(f"{number:>11}" for number in numbers)
            + f"{loss:>9}{run.seconds / 3600:>8.2f}"
        )
    return "\n".join(lines)


def ranked(runs: Sequence[Run]) -> list[Run]:
    """Return runs by falling best AP, those without an evaluation last."""
    return sorted(runs, key=lambda r: -r.results[r.best]["AP"] if r.best else 1.0)


def page(runs: Sequence[Run]) -> str:
    """Return a page that needs nothing else: curves, results, differing options."""

    def chart(title: str, of: Callable[[Run], Mapping[int, float]]) -> Any:
        curves = {run.name: of(run) for run in runs if of(run)}
        return svg(run_chart(curves, ylabel=title), f"{title} by epoch") if curves else None

    return render(
        Path(__file__).with_name("comparison.html.j2"),
        title="Comparison of runs",
        runs=ranked(runs),
        all=runs,
        metrics=_METRICS,
        charts={
            "AP on the validation data": chart(
                "AP", lambda run: {epoch: found["AP"] for epoch, found in run.results.items()}
            ),
            "AP at IoU 0.50": chart(
                "AP50",
                lambda run: {
                    e: found["AP50"] for e, found in run.results.items() if "AP50" in found
                },
            ),
            "Training loss": chart("loss", lambda run: run.losses),
        },
        options=differing_options(runs),
    )
