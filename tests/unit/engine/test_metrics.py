"""Steps' values on their way to logs and means: delayed, named, and judged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.averages import Averages, official_log_values
from engine.guards import FlatLoss, Guards, MemoryGuard, NonFiniteSteps, UnreadableImages
from engine.guards.timer import StepTimer
from engine.metrics import StepLog
from engine.optim import Precision
from engine.run_log import RunLog
from models.criterion import SetCriterion
from models.matcher import HungarianMatcher
from util.batch import Batch
from util.errors import UserError
from util.world import World

CPU = torch.device("cpu")


def criterion() -> SetCriterion:
    """Return one that doubles `loss_ce`; other names are only reported."""
    return SetCriterion(HungarianMatcher(), weights={"loss_ce": 2.0})


def step_log(folder: Path, log: RunLog, *, limit: int = 3, first_step: int = 0) -> StepLog:
    precision = Precision("fp32", CPU)
    guards = Guards(
        UnreadableImages(),
        MemoryGuard(1),
        NonFiniteSteps(nn.Identity(), precision, folder, rank=0, limit=limit),
        FlatLoss(effective_batch=4, lr=0.1, window=10, first_step=first_step),
    )
    return StepLog(log, criterion(), World(), StepTimer(CPU), guards, CPU)


def add(steps: StepLog, step: int, loss: float, *, norm: float = 1.0) -> None:
    """Take in a step as the trainer does."""
    steps.timer.mark("forward")
    metrics = {"loss": loss, "loss_ce": loss / 4, "grad_norm": norm}
    batch = Batch(None, [{"image_id": torch.tensor(10 + step)}], [])
    steps.add(
        step,
        0,
        [batch, Batch(None, [{"image_id": torch.tensor(-1)}], [], blank=True)],
        {name: torch.tensor(value) for name, value in metrics.items()},
        {"lr_transformer": 0.5},
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_last_steps_wait_until_asked_for(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        steps = step_log(tmp_path, log)
        assert steps.flush() is None
        for step in range(3):
            add(steps, step, loss=4.0 - step)
        latest = steps.flush(keep=1)
        assert [line["step"] for line in lines(tmp_path)] == [0, 1]
        assert latest == {"loss": 3.0, "loss_ce": 1.5, "loss_ce_unscaled": 0.75, "grad_norm": 1.0}
        assert steps.flush(keep=1) is None
        assert steps.flush() is not None
    written = lines(tmp_path)
    assert [line["loss"] for line in written] == [4.0, 3.0, 2.0]
    assert all(line["lr_transformer"] == 0.5 for line in written)
    assert all(line["time"] == line["time_forward"] >= 0 for line in written)
    assert steps.averages.means() == {"loss": 3.0, "loss_ce": 0.75, "grad_norm": 1.0}
    assert steps.times == {"forward": pytest.approx(sum(line["time"] for line in written))}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (math.inf, 1.0)])
def test_non_finite_values_are_recorded_but_left_out_of_means(
    tmp_path: Path, loss: float, norm: float
) -> None:
    with RunLog(tmp_path) as log:
        steps = step_log(tmp_path, log)
        add(steps, 0, 2.0)
        add(steps, 1, loss, norm=norm)
        add(steps, 2, 4.0)
        steps.flush()
    assert steps.averages.means()["loss"] == 3.0
    assert steps.guards.nonfinite.total == 1
    (report,) = (tmp_path / "nonfinite").iterdir()
    content = json.loads(report.read_text())
    assert (content["step"], content["image_ids"]) == (1, [11])
    assert content["first_nonfinite"].startswith("the forward pass was finite here")
    assert content["learning_rates"] == {"lr_transformer": 0.5}
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_a_finite_step_resets_the_count(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        steps = step_log(tmp_path, log, limit=2)
        for step, loss in enumerate([math.nan, 1.0, math.nan, 1.0, math.nan]):
            add(steps, step, loss)
        steps.flush()
        add(steps, 5, math.nan)
        with pytest.raises(UserError, match="step 5: .* 2 steps in a row"):
            steps.flush()
    assert steps.guards.nonfinite.total == 4
    assert len(lines(tmp_path)) == 6


def test_a_flat_loss_is_reported_after_the_warm_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first_step, warned in ((0, True), (40, False)):
        with RunLog(tmp_path) as log:
            steps = step_log(tmp_path, log, first_step=first_step)
            for step in range(45):
                add(steps, step, 9.0 + step % 2)
            steps.flush()
        assert ("the loss has not fallen" in capsys.readouterr().out) == warned


def test_a_restored_log_continues_like_the_original(tmp_path: Path) -> None:
    ends = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        with RunLog(folder) as log:
            steps = step_log(folder, log)
            for step in range(4):
                if stop and step == 2:
                    steps.flush()
                    state = json.loads(json.dumps(steps.state_dict()))
                    steps = step_log(folder, log)
                    steps.load_state_dict(state)
                add(steps, step, math.nan if step == 1 else 5.0 - step)
            steps.flush()
        ends.append((steps.averages.means(), steps.guards.state_dict()))
    assert ends[0] == ends[1]
    steps.begin_epoch()
    assert steps.averages.means() == {}


values = st.lists(st.floats(-100, 100), min_size=2, max_size=2)


@given(st.lists(st.lists(values, max_size=4), min_size=1, max_size=4))
def test_merged_means_are_those_of_all_values(processes: list[list[list[float]]]) -> None:
    parts = []
    for rows in processes:
        part = Averages()
        for row in rows:
            part.add(dict(zip("ab", row, strict=True)))
        parts.append(part)
    for other in parts[1:]:
        if other.count:
            parts[0].add(other.totals, other.count)
    every = [row for rows in processes for row in rows]
    assert parts[0].count == len(every)
    means = parts[0].means()
    assert set(means) == ({"a", "b"} if every else set())
    for i, name in enumerate(means):
        assert means[name] == pytest.approx(sum(r[i] for r in every) / len(every), abs=1e-9)


def test_means_restart_when_a_resumed_run_has_other_losses() -> None:
    means = Averages({"loss": 6.0, "loss_ce": 4.0}, 2)
    means.add({"loss": 5.0, "loss_iou": 2.0, "loss_ce": 1.0})
    assert means.means() == {"loss": 5.0, "loss_iou": 2.0, "loss_ce": 1.0}


def test_losses_are_named_as_in_official_logs() -> None:
    named = official_log_values({"loss": 3.0, "loss_ce_0": 0.5, "class_error": 70.0}, criterion())
    assert named == {"loss": 3.0, "loss_ce_0": 1.0, "loss_ce_0_unscaled": 0.5, "class_error": 70.0}
