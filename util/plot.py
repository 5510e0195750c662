"""Charts: training curves as an image, and those of reports."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from util.files import atomic_path
from util.json_lines import json_lines

THEME = {"soft": "#5b6068", "line": "#d9dce1", "c0": "#1f6fb5", "c1": "#c2570c", "c2": "#22805a"}
"""Colours of text, of lines behind a chart and of its series; a dark page replaces them."""
_SERIES = tuple(THEME[f"c{i}"] for i in range(3))
_DASHES = ("-", (0, (5, 3)), (0, (1, 1.5)))

MOST_RUNS = len(_SERIES) * len(_DASHES)  # that can be told apart

_MOST_EPOCHS = 2**31
_LARGEST_DRAWN = 1e30  # the ticks of an axis are computed beyond its ends
_COLOURS = ("#222222", *_SERIES)  # of training curves

_LOSSES = {
    "total": "train_loss",
    "class (focal)": "train_loss_ce",
    "box L1": "train_loss_bbox",
    "box GIoU": "train_loss_giou",
}
_METRICS = {"AP": 0, "AP50": 1, "AP75": 2}  # positions among COCO's 12 numbers


def plot_curves(log_path: Path, out_path: Path) -> None:
    """Draw losses and AP over epochs from a run's `log.txt` as a PNG.

    Epochs without an evaluation are left out of the AP curves, as are AP where there was no
    ground truth and losses that are null. A dotted line marks a drop of the learning rate.
    """
    lines: dict[int, dict[str, Any]] = {}
    for _, entry in json_lines(log_path):
        if type(entry.get("epoch")) is int and 0 <= entry["epoch"] < _MOST_EPOCHS:
            lines[entry["epoch"]] = entry  # the last line of an epoch counts
    epochs = [lines[epoch] for epoch in sorted(lines)]
    numbers = {e["epoch"] + 1: _list(e.get("test_coco_eval_bbox")) for e in epochs}
    panels = {
        "training loss": {
            name: {e["epoch"] + 1: e[key] for e in epochs if finite(e.get(key))}
            for name, key in _LOSSES.items()
        },
        "COCO box AP, validation": {
            name: {x: y[i] for x, y in numbers.items() if i < len(y) and finite(y[i]) and y[i] >= 0}
            for name, i in _METRICS.items()
        },
    }
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
            if points:
                x, y = list(points), list(points.values())
                # a lone point has no line to show it
                style = {"color": colour, "marker": "o" if len(x) <= 30 else None, "markersize": 3}
                axes.plot(x, y, label=f"{name}  {y[-1]:.3f}", **style)
        for before, after in zip(epochs[:-1], epochs[1:], strict=True):
            rates = before.get("train_lr"), after.get("train_lr")
            old, new = (rate if finite(rate) else None for rate in rates)
            # a cosine's end falls less steeply
            if old is not None and new is not None and 0 < new <= old / 5:
                axes.axvline(after["epoch"] + 0.5, color="#999999", linewidth=1, linestyle=":")
        _style(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="epoch", xlim=(0.5, (epochs[-1]["epoch"] + 1 if epochs else 1) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if any(curves.values()):
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=9, title="last value", title_fontsize=8)
        else:
            axes.text(
                0.5, 0.5, "nothing yet", ha="center", transform=axes.transAxes, color="#888888"
            )
    with atomic_path(out_path) as temporary:
        figure.savefig(temporary, format="png")


def finite(value: object) -> bool:
    """Return whether a value of a log is a number that can be drawn."""
    return type(value) in (int, float) and abs(cast(float, value)) < _LARGEST_DRAWN


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def curve_chart(lines: Mapping[str, Sequence[float]]) -> Figure:
    """Return precision over recall, each line at evenly spaced recalls 0..1."""
    figure, axes = _chart(320)
    for i, (name, values) in enumerate(lines.items()):
        recalls, colour, dashes = np.linspace(0, 1, len(values)), _SERIES[i % 3], _DASHES[i % 3]
        axes.plot(recalls, values, label=name, color=colour, linestyle=dashes, lw=2, clip_on=False)
    ticks = np.linspace(0, 1, 5)
    axes.set(xlabel="recall", ylabel="precision", xticks=ticks, yticks=ticks)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    _legend(axes)
    return figure


def run_chart(curves: Mapping[str, Mapping[int, float]], *, ylabel: str) -> Figure:
    """Return values over epochs, counted from 1, of at most `MOST_RUNS` runs."""
    figure, axes = _chart(320)
    for i, (name, points) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": _SERIES[i % 3], "linestyle": _DASHES[i // 3], "lw": 2}
        marker = "o" if len(points) == 1 else None  # a lone point has no line to show it
        axes.plot(list(points), list(points.values()), label=name, marker=marker, **style)
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, names = axes.get_legend_handles_labels()
    names = [name.replace("$", r"\$") for name in names]  # no dollar starts a formula
    axes.legend(handles, names, frameon=False, fontsize=11, labelcolor=THEME["soft"])
    return figure


def column_chart(
    labels: Sequence[str], series: Mapping[str, Sequence[int]], *, xlabel: str
) -> Figure:
    """Return columns over `labels`: what share of each series' total falls there."""
    figure, axes = _chart(250)
    shares = {name: [n / max(1, sum(counts)) for n in counts] for name, counts in series.items()}
    width = 0.8 / max(1, len(series))
    for i, (name, heights) in enumerate(shares.items()):
        middles = np.arange(len(labels)) - 0.4 + (i + 0.5) * width
        bars = axes.bar(middles, heights, width, label=name, color=_SERIES[i % 3])
        for bar, label, count in zip(bars, labels, series[name], strict=True):
            bar.set_gid(f"{name}, {label}: {count}")
    tallest = max((max(heights) for heights in shares.values()), default=0)
    axes.set(xlabel=xlabel, xlim=(-0.5, len(labels) - 0.5), ylim=(0, ceil(5 * tallest) / 5 or 1))
    # no dollar starts a formula
    axes.set_xticks(range(len(labels)), [label.replace("$", r"\$") for label in labels])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(visible=False, axis="x")
    _legend(axes)
    return figure


def _chart(height: float) -> tuple[Figure, Axes]:
    """Return a chart of a report, 560 x `height` pixels as SVG."""
    figure = Figure(figsize=(560 / 72, height / 72))
    axes = figure.add_axes((56 / 560, 50 / height, 486 / 560, 1 - 84 / height))
    _style(axes)
    axes.tick_params(length=0, pad=7, colors=THEME["soft"], labelsize=12)
    axes.xaxis.label.set(color=THEME["soft"], fontsize=12)
    axes.yaxis.label.set(color=THEME["soft"], fontsize=12)
    axes.spines[:].set_visible(False)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.grid(color=THEME["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            [name.replace("$", r"\$") for name in names],  # no dollar starts a formula
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(names),
            frameon=False,
            fontsize=12,
            labelcolor=THEME["soft"],
        )
