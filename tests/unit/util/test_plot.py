"""Training curves: any log that a run can leave makes an image that shows what is in it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from util.plot import plot_curves


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
    """Tell for the left and the right half of two images whether they differ."""
    assert a.size == b.size
    half = a.width // 2
    left, right = (0, 0, half, a.height), (half, 0, a.width, a.height)
    boxes = [ImageChops.difference(a.crop(part), b.crop(part)).getbbox() for part in (left, right)]
    return boxes[0] is not None, boxes[1] is not None


def test_losses_are_left_and_metrics_right(tmp_path: Path) -> None:
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
def test_thin_logs_make_a_image(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    image = plot(tmp_path, lines)
    assert image.width > 800


def test_torn_and_repeated_lines_change_nothing(tmp_path: Path) -> None:
    clean = plot(tmp_path, [epoch(0), epoch(1), epoch(2)])
    messy = plot(tmp_path, [epoch(0), epoch(1, train_loss=99.0), epoch(1), epoch(2), '{"epoch": 3'])
    assert differs(clean, messy) == (False, False)


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
