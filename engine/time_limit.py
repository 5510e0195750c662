"""A run as long as its time allows: steps are timed, then its length is fixed once and for all."""

import math
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any, Protocol

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from datasets.loader import TrainLoader
from engine.between_epochs import Validation
from engine.ema import Ema
from engine.metrics import StepLog
from engine.optim import Schedule, set_rates
from models.deformable_detr import DeformableDETR
from util.console import log
from util.world import World

_UNTIMED = 5  # first steps, in which kernels are chosen, compiled and loaded
_FEWEST, _ENOUGH = 5, 30  # steps that are timed, where they take long and else
_SHARE = 0.02  # of the time, after which the fewest are enough
_BLOCKS = 5  # in which steps are averaged before their median is taken
_LATE = 1.1  # factor on the time, from which a warning is worth it


@dataclass(frozen=True)
class Rhythm:
    """How often a run evaluates and saves. `save_every` is in steps; 0: after epochs alone."""

    steps_per_epoch: int
    eval_every: int
    save_every: int


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take."""

    step: float
    epoch: float  # what its first step takes longer, waiting for the loaders
    evaluation: float
    checkpoint: float

    def between(self, first: int, last: int, rhythm: Rhythm, *, ending: bool) -> float:
        """Return the seconds from `first` steps to `last` steps done.

        An epoch that ends with step `first` is still to be evaluated. `ending`: the run ends at
        `last`, with an evaluation of an epoch that may be a part of one.
        """
        before = max(first - 1, 0) // rhythm.steps_per_epoch
        whole, part = divmod(last, rhythm.steps_per_epoch)
        epochs = whole + (ending and part > 0)
        evaluations = epochs // rhythm.eval_every - before // rhythm.eval_every
        evaluations += ending and epochs % rhythm.eval_every > 0
        saved = epochs - before + 2 * evaluations  # before the evaluation, and the best
        if rhythm.save_every:
            saved += last // rhythm.save_every - first // rhythm.save_every
        return (
            (last - first) * self.step
            + (epochs - before) * self.epoch
            + evaluations * self.evaluation
            + saved * self.checkpoint
        )

    def steps_within(self, seconds: float, done: int, rhythm: Rhythm) -> int:
        """Return the length in steps of the longest run that ends within the seconds.

        `done` steps were made before; the run has at least these.
        """
        longest = done + math.ceil(max(seconds, 0.0) / self.step)
        lengths = range(done, longest + 1)
        fitting = bisect_right(
            lengths, seconds, key=lambda last: self.between(done, last, rhythm, ending=True)
        )
        return max(done, done + fitting - 1)


@dataclass(frozen=True)
class Length:
    """The length of a run in steps, with what it was computed from: never measured again.

    `decided_at` are the steps done then, `used` the seconds.
    """

    steps: int
    decided_at: int
    used: float
    costs: Costs


class TimedRun(Protocol):
    """What a time limit reads of a run, and sets in it: the trainer."""

    detector: DeformableDETR
    model: nn.Module
    scheduler: LambdaLR
    ema: Ema | None
    world: World
    loader: TrainLoader
    validation: Validation | None
    steps: StepLog
    epochs: int
    flush_every: int
    step: int

    @property
    def last_step(self) -> int | None:
        """The steps of the whole run, as far as their number is known."""

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint."""


class TimeLimit:
    """Fits a run into a number of hours.

    `add_step` times the first steps. Once `measured`, `decide` fixes the length; all that depends
    on it follows from `length`, which checkpoints keep. Time counts from the first step, over all
    parts of a run that is resumed.
    """

    def __init__(
        self, hours: float, rhythm: Rhythm, *, schedule: Schedule, unmixed_epochs: int
    ) -> None:
        """The last `unmixed_epochs` mix no images."""
        self.hours = hours
        self.rhythm = rhythm
        self.schedule = schedule
        self.unmixed_epochs = unmixed_epochs
        self.length: Length | None = None
        self.evaluation: float | None = None  # seconds, of the latest
        self._times: list[float] = []
        self._first_times: list[float] = []  # of steps that began an epoch, or a part of one
        self._used, self._since = 0.0, 0.0
        self._ratio = _LATE  # of the last warning

    @property
    def steps(self) -> int:
        """The length of the run; 0 as long as it is not known."""
        return self.length.steps if self.length else 0

    @property
    def epochs(self) -> int:
        """The number of epochs, of which the last may be a part of one."""
        return -(-self.steps // self.rhythm.steps_per_epoch)

    @property
    def mixed_epochs(self) -> int:
        """The number of epochs whose images may be mixed.

        One of them is that in which the length was decided: loaders are ahead of the training.
        """
        assert self.length is not None
        decided_in = (self.length.decided_at - 1) // self.rhythm.steps_per_epoch
        return max(self.epochs - self.unmixed_epochs, decided_in + 1)

    def start(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def after_step(self, run: TimedRun, seconds: float, bar: "tqdm[Any]", *, first: bool) -> None:
        """Time a step, and fix the length of the run once enough are timed; all must call it.

        `first` steps after a pause wait for the loaders. The main process decides.
        """
        if self.length is not None:
            late = self.lateness(run.step) if run.step % run.flush_every == 0 else None
            if late and run.world.main:
                log.warning(late)
            return
        self.add_step(seconds, first=first)
        if not run.world.broadcast(self.measured):
            return
        averaged = None if run.ema is None else run.ema.model
        evaluation = self.evaluation or 0.0
        if not evaluation and run.validation is not None:
            evaluation = run.validation.estimate_seconds(run.detector, averaged)
        run.model.train()
        run.steps.flush()
        started = time.perf_counter()
        run.save()
        checkpoint = time.perf_counter() - started
        self.length = run.world.broadcast(
            self.decide(run.step, evaluation=evaluation, checkpoint=checkpoint)
        )
        self.lay_out(run)
        run.save()
        log.info(self.describe())
        if self.steps == run.step:
            log.warning(f"`max_hours {self.hours:g}` ends with the steps that were timed")
        bar.total = run.last_step
        bar.refresh()

    def lay_out(self, run: TimedRun) -> None:
        """Lay the schedule, the epochs and the end of mixing over the length of the run."""
        if self.length is None:
            return
        run.epochs = self.epochs
        run.loader.mix_until(self.mixed_epochs)
        scheduler = run.scheduler
        scheduler.lr_lambdas = [self.schedule.over(self.steps)] * len(scheduler.lr_lambdas)
        set_rates(scheduler)

    @property
    def used(self) -> float:
        """The seconds that the run has taken so far."""
        return self._used + (time.perf_counter() - self._since if self._since else 0.0)

    def add_step(self, seconds: float, *, first: bool) -> None:
        """Take in how long a step took; `first` ones waited for the loaders to begin."""
        (self._first_times if first else self._times).append(seconds)

    @property
    def measured(self) -> bool:
        """Whether enough steps were timed."""
        count = len(self._times) - _UNTIMED
        share = self.used / (self.hours * 3600)
        return count >= (_FEWEST if share >= _SHARE else _ENOUGH)

    def decide(self, done: int, *, evaluation: float, checkpoint: float) -> Length:
        """Return the length of the run, after `done` steps; the others are seconds."""
        step = robust_mean(self._times[_UNTIMED:])
        begin = median(self._first_times or [step])
        costs = Costs(step, max(begin - step, 0.0), evaluation, checkpoint)
        used = self.used
        steps = costs.steps_within(self.hours * 3600 - used, done, self.rhythm)
        return Length(steps, done, used, costs)

    def describe(self) -> str:
        """Return the length and what it was computed from, for the log."""
        assert self.length is not None
        costs, epochs = self.length.costs, self.steps / self.rhythm.steps_per_epoch
        return (
            f"max_hours {self.hours:g}: a step takes {costs.step:.3g} s, an evaluation "
            f"{costs.evaluation:.3g} s and a checkpoint {costs.checkpoint:.2g} s, so the run has "
            f"{self.steps} steps, {epochs:.3g} epochs"
        )

    def lateness(self, done: int) -> str | None:
        """Return a warning if, after `done` steps, the run is to end well after its time.

        The length stays as it is. Another warning comes when it has become later by as much again.
        """
        if self.length is None:
            return None
        total, decided = self.hours * 3600, self.length
        planned = decided.costs.between(decided.decided_at, done, self.rhythm, ending=False)
        if planned < _SHARE * total:
            return None
        ratio = (self.used - decided.used) / planned
        expected = decided.used + ratio * max(total - decided.used, planned)
        if expected < self._ratio * total:
            return None
        self._ratio = _LATE * expected / total
        return (
            f"steps or evaluations have become slower: the run is to end after "
            f"{expected / 3600:.3g} hours, not {self.hours:g}. It keeps its {self.steps} steps, "
            "over which its schedule is laid; a signal stops it earlier."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "hours": self.hours,
            "used": self.used,
            "times": list(self._times) if self.length is None else [],
            "first_times": list(self._first_times) if self.length is None else [],
            "evaluation": self.evaluation,
            "length": asdict(self.length) if self.length else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        With other hours than those of the state, the length follows from what was measured then.
        """
        self._used = state["used"]
        self._times, self._first_times = list(state["times"]), list(state["first_times"])
        self.evaluation = state["evaluation"]
        saved = state["length"]
        if saved is not None:
            length = Length(**{**saved, "costs": Costs(**saved["costs"])})
            if self.hours != state["hours"]:
                seconds = self.hours * 3600 - length.used
                steps = length.costs.steps_within(seconds, length.decided_at, self.rhythm)
                length = replace(length, steps=steps)
            self.length = length
            log.info(self.describe())


def robust_mean(values: Sequence[float]) -> float:
    """Return the median of the means of five blocks.

    A mean counts every step of a rhythm, as of loaders that deliver in bursts; the median leaves
    out a hiccup.
    """
    size = len(values) // _BLOCKS
    blocks = [values[len(values) - (i + 1) * size :][:size] for i in range(_BLOCKS)]
    return median(map(mean, blocks))
