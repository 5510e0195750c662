"""What steps gave: from the device to logs and means, in blocks, so that none waits for it."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.guards.flat_loss import FlatLossWatchdog
from engine.guards.nonfinite import NonfiniteRecorder
from engine.guards.timer import StepTimer
from engine.precision import Precision
from engine.run_log import RunLog
from util.console import console
from util.distributed import World


class Weights(Protocol):
    """Knows the coefficient of each loss."""

    def weight(self, name: str) -> float | None:
        """Return a loss's coefficient, None for what is only reported."""


@dataclass
class Averages:
    """Running means of named values."""

    names: list[str] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, names: Sequence[str], values: Sequence[float]) -> None:
        """Add one set of values."""
        if not self.count:
            self.names, self.totals = list(names), [0.0] * len(names)
        self.totals = [t + v for t, v in zip(self.totals, values, strict=True)]
        self.count += 1

    def merge(self, others: Sequence["Averages"]) -> None:
        """Take in those of other processes."""
        for other in others:
            if other.count and not self.count:
                self.names, self.totals = other.names, [0.0] * len(other.names)
            if other.count:
                self.totals = [a + b for a, b in zip(self.totals, other.totals, strict=True)]
            self.count += other.count

    def means(self) -> dict[str, float]:
        """Return the mean of each value; empty when nothing was added."""
        return {n: t / self.count for n, t in zip(self.names, self.totals, strict=True)}


def official_log_values(values: Mapping[str, float], weights: Weights) -> dict[str, float]:
    """Name losses as official logs do: weighted under the bare name, raw under `_unscaled`."""
    named: dict[str, float] = {}
    for name, value in values.items():
        weight = weights.weight(name)
        named[name] = value if weight is None else value * weight
        if weight is not None:
            named[f"{name}_unscaled"] = value
    return named


@dataclass(frozen=True)
class StepRecord:
    """One step's values, on their way from the device."""

    step: int
    epoch: int
    names: list[str]
    values: Tensor
    image_ids: list[int]
    rates: dict[str, float]
    module: str  # where the forward of this process was not finite, if it was not


@dataclass
class StepLog:
    """Writes steps to the run's logs, counts those without finite values, and keeps means."""

    log: RunLog
    weights: Weights
    world: World
    timer: StepTimer
    precision: Precision
    recorder: NonfiniteRecorder
    watchdog: FlatLossWatchdog
    watch_from: int = 0  # the step after the warm-up
    averages: Averages = field(default_factory=Averages)
    shares: list[dict[str, float]] = field(default_factory=list)  # of the epoch
    _pending: list[StepRecord] = field(default_factory=list)
    _timed: deque[int] = field(default_factory=deque)
    _times: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, record: StepRecord) -> None:
        """Take a step's values; they are written by a later `flush`."""
        self._pending.append(record)
        self._timed.append(record.step)

    def flush(self, *, keep: int = 0) -> dict[str, float] | None:
        """Write all pending steps but the last `keep`; return the latest values.

        Every process calls it at the same steps.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        count = max(len(self._pending) - keep, 0)
        records, self._pending = self._pending[:count], self._pending[count:]
        if not records:
            return None
        if not keep and self.precision.device.type == "cuda":
            torch.cuda.synchronize(self.precision.device)  # the last step's values are on their way
        rows = torch.stack([r.values for r in records]).double()
        if self.world.size > 1:
            total = self.world.sum(rows.flatten().tolist())
            rows = torch.tensor(total, dtype=torch.float64).view_as(rows) / self.world.size
        times = {self._timed.popleft(): parts for parts in self.timer.collect()}
        self.shares += times.values()
        self._times |= times  # of those that are kept back, too
        latest: dict[str, float] = {}
        for record, row in zip(records, rows.tolist(), strict=True):
            latest = official_log_values(dict(zip(record.names, row, strict=True)), self.weights)
            parts = self._times.pop(record.step, {})
            timed = {f"time_{part}": seconds for part, seconds in parts.items()}
            timed["time"] = sum(parts.values())
            self.log.step(record.step, {**latest, **record.rates, **timed})
            self._judge(record, row, latest)
        return latest

    def _judge(self, record: StepRecord, row: list[float], latest: Mapping[str, float]) -> None:
        if math.isfinite(latest["loss"] + latest["grad_norm"]):
            self.recorder.finite()
            self.averages.add(record.names, row)
            if record.step >= self.watch_from:
                warning = self.watchdog.add(record.step, latest["loss"])
                if warning:
                    console(warning)
            return
        scale = self.precision.current_scale()
        if scale > 1 and math.isfinite(latest["loss"]):
            return  # float16 looking for the largest scale that fits
        self.recorder.record(
            step=record.step,
            epoch=record.epoch,
            image_ids=record.image_ids,
            losses=latest,
            grad_norm=latest["grad_norm"],
            scale=scale,
            rates=record.rates,
            module=record.module or "the forward pass was finite here, the gradient was not",
        )

    def begin_epoch(self) -> None:
        """Begin new means and times."""
        self.averages, self.shares = Averages(), []

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint; nothing may be pending."""
        means = self.averages
        return {
            "averages": [list(means.names), list(means.totals), means.count],
            "nonfinite": self.recorder.state(),
            "watchdog": self.watchdog.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        names, totals, count = state["averages"]
        self.averages = Averages(list(names), list(totals), count)
        self.recorder.restore(state["nonfinite"])
        self.watchdog.restore(state["watchdog"])
