"""Step metrics: copied from the device without blocking, logged in batches."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.guards import Guards
from engine.guards.guard import LoggedStep
from engine.guards.timer import StepTimer
from engine.run_log import RunLog
from models.criterion import SetCriterion
from util.batch import Batch
from util.world import World


@dataclass
class Averages:
    """Running means of named values."""

    names: list[str] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, names: Sequence[str], values: Sequence[float]) -> None:
        """Add one set of values; begin anew if the names are others, as those of other losses."""
        if self.names != list(names):
            self.names, self.totals, self.count = list(names), [0.0] * len(names), 0
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


def official_log_values(values: Mapping[str, float], criterion: SetCriterion) -> dict[str, float]:
    """Name losses as official logs do: weighted under the bare name, raw under `_unscaled`."""
    named: dict[str, float] = {}
    for name, value in values.items():
        weight = criterion.weight(name)
        named[name] = value if weight is None else value * weight
        if weight is not None:
            named[f"{name}_unscaled"] = value
    return named


@dataclass
class StepLog:
    """Writes steps to the run's logs, shows them to the guards, and keeps means."""

    log: RunLog
    criterion: SetCriterion
    world: World
    timer: StepTimer
    guards: Guards
    device: torch.device
    averages: Averages = field(default_factory=Averages)
    times: list[dict[str, float]] = field(default_factory=list)  # of the epoch's steps
    _pending: list[tuple[LoggedStep, list[str], Tensor]] = field(default_factory=list)
    _timed: deque[int] = field(default_factory=deque)
    _times: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(
        self,
        step: int,
        epoch: int,
        micro_batches: Sequence[Batch],
        metrics: Mapping[str, Tensor],
        rates: dict[str, float],
    ) -> None:
        """Take a step's metrics, which a later `flush` writes, and end the timing of the step."""
        self.timer.finish_step()
        values = torch.stack([value.float() for value in metrics.values()])
        ids = [int(t["image_id"]) for b in micro_batches if not b.blank for t in b.targets]
        logged = LoggedStep(step, epoch, ids, {}, rates)
        self._pending.append((logged, list(metrics), values.to("cpu", non_blocking=True)))
        self._timed.append(step)

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
        if not keep and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last step's values are on their way
        rows = torch.stack([values for *_, values in records]).double()
        if self.world.size > 1:
            total = self.world.sum(rows.flatten().tolist())
            rows = torch.tensor(total, dtype=torch.float64).view_as(rows) / self.world.size
        times = {self._timed.popleft(): parts for parts in self.timer.collect()}
        self.times += times.values()
        self._times |= times  # of those that are kept back, too
        latest: dict[str, float] = {}
        for (step, names, _), row in zip(records, rows.tolist(), strict=True):
            latest = official_log_values(dict(zip(names, row, strict=True)), self.criterion)
            parts = self._times.pop(step.step, {})
            timed = {f"time_{part}": seconds for part, seconds in parts.items()}
            timed["time"] = sum(parts.values())
            self.log.step(step.step, {**latest, **step.rates, **timed})
            step = replace(step, values=latest)
            if step.finite:
                self.averages.add(names, row)
            for guard in self.guards:
                guard.on_log(step)
        return latest

    def begin_epoch(self) -> None:
        """Begin new means and times."""
        self.averages, self.times = Averages(), []

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, the guards' too; nothing may be pending."""
        means = self.averages
        return {
            "averages": [list(means.names), list(means.totals), means.count],
            **self.guards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        names, totals, count = state["averages"]
        self.averages = Averages(list(names), list(totals), count)
        self.guards.load_state_dict(state)
