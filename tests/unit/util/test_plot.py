"""Training curves: any log that a run can leave makes an image that shows what is in it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle
from PIL import Image, ImageChops

from util.plot import column_chart, curve_chart, plot_curves

# names of splits and IoUs; a legend leaves out those that begin with an underscore
NAME = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12
).filter(lambda text: not text.startswith("_"))


def plot(folder: Path, lines: Sequence[Any]) -> Image.Image:
    log = folder / "log.txt"
    log.write_text("".join(f"{s if isinstance(s, str) else json.dumps(s)}\n" for s in lines))
    plot_curves(log, folder / "out" / "curves.png")
    with Image.open(folder / "out" / "curves.png") as file:
        assert file.format == "PNG"
        image: Image.Image = file.convert("RGB")
    return image


def epoch(number: int, **more: Any) -> dict[str, Any]:
    names = ("train_loss", "train_loss_ce", "train_loss_bbox", "train_loss_giou")
    losses = {name: (4 - i) / (number + 1) for i, name in enumerate(names)}
    return {"epoch": number, **losses, "train_lr": 2e-4, **more}


def differs(a: Image.Image, b: Image.Image) -> tuple[bool, bool]:
    """Return whether the left halves of two images differ, and whether the right ones do."""
    assert a.size == b.size
    half = a.width // 2
    left, right = (0, 0, half, a.height), (half, 0, a.width, a.height)
    boxes = [ImageChops.difference(a.crop(part), b.crop(part)).getbbox() for part in (left, right)]
    return boxes[0] is not None, boxes[1] is not None


@pytest.mark.long
def test_losses_are_drawn_left_and_metrics_right(tmp_path: Path) -> None:
    numbers = [0.4, 0.6, 0.45] + [0.1] * 9
    plain = plot(tmp_path, [epoch(i, test_coco_eval_bbox=numbers) for i in range(4)])
    better = [epoch(i, test_coco_eval_bbox=[0.5, *numbers[1:]]) for i in range(4)]
    worse = [epoch(i, train_loss=3.8 / (i + 1), test_coco_eval_bbox=numbers) for i in range(4)]
    assert differs(plain, plot(tmp_path, better)) == (False, True)
    assert differs(plain, plot(tmp_path, worse)) == (True, False)


def test_only_ap_ap50_ap75_count(tmp_path: Path) -> None:
    plain = plot(tmp_path, [epoch(0, test_coco_eval_bbox=[0.4, 0.6, 0.45] + [0.1] * 9)])
    other = plot(tmp_path, [epoch(0, test_coco_eval_bbox=[0.4, 0.6, 0.45] + [0.9] * 9)])
    assert differs(plain, other) == (False, False)


@pytest.mark.long
@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"epoch": 0}],
        [epoch(0)],
        [epoch(i) for i in range(80)],
        [epoch(0, train_loss=None), epoch(1, test_coco_eval_bbox=[-1.0] * 12)],
        [epoch(0, test_coco_eval_bbox=[None] * 12)],
    ],
    ids=["empty", "bare", "one", "many", "null and no ground truth", "null metrics"],
)
def test_short_logs_are_drawn(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    image = plot(tmp_path, lines)
    assert image.width > 800


def test_torn_and_repeated_lines_change_nothing(tmp_path: Path) -> None:
    clean = plot(tmp_path, [epoch(0), epoch(1), epoch(2)])
    messy = plot(tmp_path, [epoch(0), epoch(1, train_loss=99.0), epoch(1), epoch(2), '{"epoch": 3'])
    assert differs(clean, messy) == (False, False)


@pytest.mark.long
def test_drop_of_the_rate_is_marked_in_both_panels(tmp_path: Path) -> None:
    steady = plot(tmp_path, [epoch(i) for i in range(4)])
    cosine = plot(tmp_path, [epoch(i, train_lr=2e-4 * 0.3**i) for i in range(4)])
    dropped = plot(tmp_path, [epoch(i, train_lr=2e-4 if i < 2 else 2e-5) for i in range(4)])
    assert differs(steady, cosine) == (False, False)
    assert differs(steady, dropped) == (True, True)


def test_no_global_figures_are_left(tmp_path: Path) -> None:
    plot(tmp_path, [epoch(0)])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.long
@settings(max_examples=40)
@given(
    labels=st.lists(NAME, min_size=1, max_size=5),
    names=st.lists(NAME, max_size=3, unique=True),
    data=st.data(),
)
def test_columns_are_shares_of_each_series(
    labels: list[str], names: list[str], data: st.DataObject
) -> None:
    counts = st.lists(st.integers(0, 10**6), min_size=len(labels), max_size=len(labels))
    series = {name: data.draw(counts) for name in names}
    (axes,) = column_chart(labels, series, xlabel="x & y").axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    assert [bar.get_gid() for bar in bars] == [
        f"{name}, {label}: {count}"
        for name, values in series.items()
        for label, count in zip(labels, values, strict=True)
    ]
    shares = [n / max(1, sum(values)) for values in series.values() for n in values]
    assert [bar.get_height() for bar in bars] == shares
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    for i, middle in enumerate(middles):
        assert round(middle) == i % len(labels), "each is over its label"
    assert len(set(np.round(middles, 6))) == len(middles), "none covers another"
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert round(5 * top, 6).is_integer()
    assert top >= max(shares, default=0) >= top - 0.2 - 1e-9 or not any(shares)
    assert axes.get_xlabel() == "x & y"
    shown = [text.get_text().replace(r"\$", "$") for text in axes.get_xticklabels()]
    assert shown == labels


@pytest.mark.long
@settings(max_examples=40)
@given(lines=st.dictionaries(NAME, st.lists(st.floats(0, 1), min_size=2, max_size=5), max_size=4))
def test_precision_runs_over_all_recalls(lines: dict[str, list[float]]) -> None:
    (axes,) = curve_chart(lines).axes
    assert [line.get_label() for line in axes.lines] == list(lines)
    for line, values in zip(axes.lines, lines.values(), strict=True):
        recalls, precisions = np.asarray(line.get_xydata()).T
        assert recalls == pytest.approx(np.linspace(0, 1, len(values)))
        assert precisions.tolist() == values
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (0, 1))
    styles = [(line.get_color(), line.get_linestyle()) for line in axes.lines[:3]]
    assert len(set(styles)) == len(styles), "apart without colour too"
