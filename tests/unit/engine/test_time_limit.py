"""How long a run is: against a simulation of it, step by step; what it is laid over; warnings."""

import copy
import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.split import BatchSplit
from engine.checkpoint import load_checkpoint
from engine.optim import Schedule
from engine.run_log import RunLog
from engine.time_limit import Costs, Rhythm, TimeLimit, robust_mean
from engine.trainer import Trainer
from tests.unit.engine.shared_steps import IMAGES, micro_batches, small_trainer, train_epoch
from util.batch import Batch
from util.errors import CheckpointError

HOUR = 3600.0
LENGTH = {
    "steps": 1000, "decided_at": 100, "used": 360.0,
    "costs": {"step": 3.6, "epoch": 0.0, "evaluation": 0.0, "checkpoint": 0.0},
}  # fmt: skip


def simulated(costs: Costs, rhythm: Rhythm, done: int, total: int) -> float:
    """Return the seconds that a run takes from `done` steps on, to its end."""
    seconds = 0.0
    for step in range(done, total + 1):
        if step > done:
            seconds += costs.step
            if rhythm.save_every and step % rhythm.save_every == 0:
                seconds += costs.checkpoint
        if step % rhythm.steps_per_epoch == 0 or step == total:
            seconds += costs.epoch + costs.checkpoint
            epoch = math.ceil(step / rhythm.steps_per_epoch)
            if epoch % rhythm.eval_every == 0 or step == total:
                seconds += costs.evaluation + 2 * costs.checkpoint
    return seconds


@pytest.mark.long
@given(
    done=st.integers(1, 20),
    rhythm=st.builds(Rhythm, st.integers(1, 9), st.integers(1, 4), st.integers(0, 7)),
    costs=st.builds(Costs, st.integers(1, 5), *[st.integers(0, 20)] * 3),
    seconds=st.integers(-5, 300),
)
def test_the_length_is_that_of_the_longest_run_that_ends_in_time(
    done: int, rhythm: Rhythm, costs: Costs, seconds: int
) -> None:
    fitting = [
        total
        for total in range(done, done + 302)
        if simulated(costs, rhythm, done, total) <= seconds
    ]
    assert costs.steps_within(seconds, done, rhythm) == max(fitting, default=done)


def test_bursts_count_and_a_hiccup_does_not() -> None:
    assert robust_mean([0.1, 0.1, 0.1, 0.1, 0.1, 1.1] * 5) == pytest.approx(1.6 / 6)
    assert robust_mean([0.2] * 29 + [60.0]) == pytest.approx(0.2)
    assert robust_mean([3.0, 1.0, 2.0, 5.0, 4.0]) == 3.0
    assert robust_mean([9.0, *range(10)]) == mean((4, 5))


def limit(hours: float = 1.0, kind: str = "cosine", steps_per_epoch: int = 10**6) -> TimeLimit:
    rhythm = Rhythm(steps_per_epoch, eval_every=1, save_every=0)
    schedule = Schedule(kind=kind, epochs=50, drop_every=40)
    return TimeLimit(hours, rhythm, schedule=schedule, unmixed_epochs=3)


def state(**changes: Any) -> dict[str, Any]:
    content = {"hours": 1.0, "used": 400.0, "times": [], "first_times": [], "evaluation": None}
    return {**content, "length": copy.deepcopy(LENGTH), **changes}


def test_the_length_comes_from_the_timed_steps_and_what_else_takes_time() -> None:
    timed = limit(hours=1.0, steps_per_epoch=20)
    for number in range(35):
        assert not timed.measured
        timed.add_step(9.0 if number < 5 else 2.0, first=False)
    timed.add_step(5.0, first=True)
    assert timed.measured
    length = timed.decide(36, evaluation=30.0, checkpoint=1.0)
    assert length.costs == Costs(2.0, 3.0, 30.0, 1.0)
    # an epoch: 20 x 2 s, 3 s until it runs, an evaluation and three checkpoints
    expected = (simulated(length.costs, timed.rhythm, 36, length.steps + more) for more in (0, 1))
    before, after = expected
    assert before <= HOUR < after


def test_few_steps_are_timed_where_they_are_a_part_of_the_time() -> None:
    timed = limit()
    timed.load_state_dict(state(used=73.0, times=[7.0] * 9, length=None))
    assert not timed.measured
    timed.add_step(7.0, first=False)
    assert timed.measured


def test_a_resumed_run_keeps_its_length_and_other_hours_change_it() -> None:
    kept, longer, over = limit(), limit(2.0), limit(0.1)
    for resumed in (kept, longer, over):
        resumed.load_state_dict(state(used=3000.0))
    assert kept.length is not None
    assert (kept.steps, kept.length.costs.step) == (1000, 3.6)
    assert longer.steps == 2000
    assert over.steps == 100  # less than it has done
    assert kept.used == 3000.0


def test_images_are_mixed_until_the_last_epochs_but_not_less_than_when_that_was_decided() -> None:
    kept = limit(steps_per_epoch=100)
    kept.load_state_dict(state())
    assert (kept.epochs, kept.mixed_epochs) == (10, 7)
    short = {**LENGTH, "steps": 101, "decided_at": 101}
    kept.load_state_dict(state(length=short))
    assert (kept.epochs, kept.mixed_epochs) == (2, 2)


def test_a_run_that_becomes_slower_is_told_of_now_and_then() -> None:
    slow = limit()
    slow.load_state_dict(state(used=360 + 400 * 3.6 * 1.05))
    assert slow.lateness(500) is None
    slow.load_state_dict(state(used=360 + 400 * 3.6 * 1.5))
    assert "after 1.45 hours, not 1. It keeps its 1000 steps" in str(slow.lateness(500))
    slow.load_state_dict(state(used=360 + 401 * 3.6 * 1.5))
    assert slow.lateness(501) is None
    slow.load_state_dict(state(used=360 + 450 * 3.6 * 1.8))
    assert "after 1.72 hours" in str(slow.lateness(550))
    assert limit().lateness(5) is None  # its length is not known yet


def steps() -> list[Batch]:
    """Return the batches of an epoch of 8 steps."""
    return micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)[:1] * 8


def trained(folder: Path, kind: str) -> tuple[Trainer, dict[str, Any]]:
    """Train two epochs of 8 steps, whose length is decided in the first; return it as saved."""
    with RunLog(folder) as log:
        trainer = small_trainer(folder, log, steps(), lr_scheduler=kind, max_hours=1e-3)
        trainer.identity = {"classes": {"ids": []}, "config": {}, "versions": {}}
        trainer.loader.mix_until = lambda epoch: None  # type: ignore[method-assign]
        assert trainer.time_limit is not None
        trainer.time_limit.evaluation = 1e-3
        trainer.time_limit.start()
        train_epoch(trainer)
        trainer.epoch, trainer.epoch_step = 1, 0
        train_epoch(trainer)
    return trainer, load_checkpoint(folder / "last.pth")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["cosine", "step", "flat_cosine"])
def test_the_schedule_is_laid_over_the_length_once_it_is_known(tmp_path: Path, kind: str) -> None:
    trainer, content = trained(tmp_path, kind)
    assert trainer.time_limit is not None
    length = trainer.time_limit.length
    assert length is not None
    assert 10 < length.decided_at <= length.steps
    saved = content["progress"]["time_limit"]
    assert saved["length"]["steps"] == length.steps == trainer.last_step
    factor = trainer.time_limit.schedule.over(length.steps)
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] * factor(trainer.scheduler.last_epoch)
    with RunLog(tmp_path) as log:
        other = small_trainer(tmp_path, log, steps(), lr_scheduler=kind, max_hours=1e-3)
        other.loader.mix_until = lambda epoch: None  # type: ignore[method-assign]
        other.load_state_dict(content)
    assert other.epochs == math.ceil(length.steps / 8)
    for group in other.optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] * factor(length.decided_at)


@pytest.mark.long
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("steps", 0, "is 0 steps at step"),
        ("used", "long", "'used'"),
        ("costs", {"step": 0.0, "epoch": 0.0, "evaluation": 0.0, "checkpoint": 0.0}, "more than 0"),
        ("costs", {}, "lacks 'step'"),
    ],
)
def test_a_length_that_no_run_has_saved_is_refused(
    tmp_path: Path, key: str, value: object, words: str
) -> None:
    trainer, content = trained(tmp_path, "cosine")
    content["progress"]["time_limit"]["length"][key] = value
    with pytest.raises(CheckpointError, match=words):
        trainer.load_state_dict(content)
