"""Numbers recorded at commit 10a4dea: the network in float64, training curves, a resumed run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.shapes import generate_shapes
from tests.integration.conftest import TINY, run_cli
from tests.recorded import model_values
from tests.unit.models.small import VARIANTS

RECORDED = model_values.FILE.parent
CURVES = json.loads((RECORDED / "curves.json").read_text())
# Older versions draw other random numbers from the same state, as for dropout.
SAME_DRAWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
OPTIONS = ("--backbone", "timm/test_efficientnet", "--ema_decay", "0.9", "--dropout", "0.1")


def _curve(folder: Path) -> list[list[float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[step["loss"], step["grad_norm"]] for step in map(json.loads, lines)]


def _assert_near(found: Any, expected: Any, name: str) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * scale, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_losses_and_gradients_are_those_recorded(variant: str) -> None:
    expected = json.loads(model_values.FILE.read_text())[variant]
    found = model_values.compute(variant)
    assert found["keys"] == expected["keys"]
    assert found["losses"].keys() == expected["losses"].keys()
    assert found["gradients"].keys() == expected["gradients"].keys()
    for part in ("logits", "boxes"):
        _assert_near(found[part], expected[part], part)
    for part in ("losses", "gradients"):
        for name, value in expected[part].items():
            _assert_near(found[part][name], value, name)


@pytest.mark.slow
@pytest.mark.skipif(not SAME_DRAWS, reason="draws other random numbers")
@pytest.mark.parametrize("variant", ["plain", "two_stage"])
def test_training_follows_the_recorded_curve(variant: str, shapes: Path, tmp_path: Path) -> None:
    """Float32 on another processor rounds differently, and at some step chooses other proposals."""
    plain = ("--no_two_stage", "--no_with_box_refine") if variant == "plain" else ()
    done = run_cli(
        "train", "--config", TINY, *OPTIONS, *plain, "--coco_path", shapes,
        "--output_dir", tmp_path / "run", "--epochs", "8", "--max_steps", "30",
        "--eval_every", "100",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    curve, recorded = _curve(tmp_path / "run"), CURVES[variant]
    np.testing.assert_allclose(curve[:20], recorded[:20], rtol=1e-3)
    losses, expected = np.array(curve)[:, 0], np.array(recorded)[:, 0]
    np.testing.assert_allclose(losses, expected, rtol=0.02)


def test_a_checkpoint_of_the_version_before_continues(tmp_path: Path) -> None:
    """The checkpoint was saved in the middle of the second of three epochs."""
    generate_shapes(tmp_path / "shapes", num_train=16, num_val=7, seed=0)
    (tmp_path / "run").mkdir()
    shutil.copy(RECORDED / "step_00000007.pth", tmp_path / "run" / "last.pth")
    done = run_cli(
        "train", "--resume", tmp_path / "run" / "last.pth", "--coco_path", tmp_path / "shapes"
    )
    assert done.returncode == 0, done.stderr
    assert len(_curve(tmp_path / "run")) == len(CURVES["resumed"])
    if SAME_DRAWS:
        np.testing.assert_allclose(_curve(tmp_path / "run"), CURVES["resumed"], rtol=1e-3)
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2
