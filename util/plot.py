"""Training curves as an image."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util.files import atomic_path

_LOSSES = {
    "train_loss": "total",
    "train_loss_ce": "class (focal)",
    "train_loss_bbox": "box L1",
    "train_loss_giou": "box GIoU",
}
_METRICS = {"AP": 0, "AP50": 1, "AP75": 2}  # positions among COCO's 12 numbers
_COLOURS = ("#222222", "#1f77b4", "#d95f02", "#2a9d5c")


def plot_curves(log_path: Path, out_path: Path) -> None:
    """Draw losses and AP over epochs from a run's `log.txt` as a PNG.

    Epochs without an evaluation are left out of the AP curves, as are AP where there was no
    ground truth and losses that are null. A dotted line marks a drop of the learning rate.
    """
    epochs = _read(log_path)
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, metrics = figure.subplots(1, 2)
    for (key, name), colour in zip(_LOSSES.items(), _COLOURS, strict=True):
        points = [(e["epoch"] + 1, e[key]) for e in epochs if e.get(key) is not None]
        _curve(losses, points, name, colour)
    evaluated = [e for e in epochs if e.get("test_coco_eval_bbox")]
    for (name, position), colour in zip(_METRICS.items(), _COLOURS, strict=False):
        values = [(e["epoch"] + 1, e["test_coco_eval_bbox"][position]) for e in evaluated]
        points = [(x, y) for x, y in values if y is not None and y >= 0]
        _curve(metrics, points, name, colour)
    _mark_drops(losses, epochs)
    _mark_drops(metrics, epochs)
    last = epochs[-1]["epoch"] + 1 if epochs else 1
    _finish(losses, "training loss", last)
    _finish(metrics, "COCO box AP, validation", last)
    with atomic_path(out_path) as temporary:  # no one sees half an image
        figure.savefig(temporary, format="png")


def _read(log_path: Path) -> list[dict[str, Any]]:
    """Return a line per epoch, skipping a torn one; the last of an epoch counts."""
    epochs: dict[int, dict[str, Any]] = {}
    for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        epochs[int(entry["epoch"])] = entry
    return [epochs[epoch] for epoch in sorted(epochs)]


def _curve(axes: Axes, points: Sequence[tuple[int, float]], name: str, colour: str) -> None:
    if not points:
        return
    x, y = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else None  # a lone point has no line to show it
    axes.plot(x, y, label=f"{name}  {y[-1]:.3f}", color=colour, marker=marker, markersize=3)


def _mark_drops(axes: Axes, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Draw a dotted line where the learning rate fell to a fifth or less between epochs."""
    for before, after in zip(epochs[:-1], epochs[1:], strict=True):
        old, new = before.get("train_lr"), after.get("train_lr")
        if old and new and new <= old / 5:  # a cosine's end falls less steeply
            axes.axvline(after["epoch"] + 0.5, color="#999999", linewidth=1, linestyle=":")


def _finish(axes: Axes, title: str, last_epoch: int) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, last_epoch + 0.5)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, title="last value", title_fontsize=8)
    else:
        axes.text(0.5, 0.5, "nothing yet", ha="center", transform=axes.transAxes, color="#888888")
