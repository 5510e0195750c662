"""Step metrics: copied from the device without blocking, logged in batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.averages import Averages, official_log_values
from engine.guards import Guards
from engine.guards.guard import LoggedStep
from engine.guards.timer import StepTimer
from engine.run_log import RunLog
from models.criterion import SetCriterion
from util.batch import Batch
from util.world import World


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
    times: dict[str, float] = field(default_factory=dict)  # seconds of the epoch's parts of steps
    _pending: list[tuple[LoggedStep, list[str], Tensor]] = field(default_factory=list)

    def add(
        self,
        step: int,
        epoch: int,
        micro_batches: Sequence[Batch],
        metrics: Mapping[str, Tensor],
        rates: dict[str, float],
    ) -> None:
        """Take a step's metrics, which a later `flush` writes, and end the timing of the step."""
        self.timer.finish_step(step)
        values = torch.stack([value.float() for value in metrics.values()])
        ids = [int(t["image_id"]) for b in micro_batches if not b.blank for t in b.targets]
        logged = LoggedStep(step, epoch, ids, {}, rates)
        self._pending.append((logged, list(metrics), values.to("cpu", non_blocking=True)))

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
        total = self.world.sum(rows.flatten().tolist())
        rows = torch.tensor(total, dtype=torch.float64).view_as(rows) / self.world.size
        for (step, names, _), row in zip(records, rows.tolist(), strict=True):
            means = dict(zip(names, row, strict=True))
            latest = official_log_values(means, self.criterion)
            parts = self.timer.take(step.step)
            for part, seconds in parts.items():
                self.times[part] = self.times.get(part, 0.0) + seconds
            timed = {f"time_{part}": seconds for part, seconds in parts.items()}
            timed["time"] = sum(parts.values())
            self.log.step(step.step, {**latest, **step.rates, **timed})
            step = replace(step, values=latest)
            if step.finite:
                self.averages.add(means)
            for guard in self.guards:
                guard.on_log(step)
        return latest

    def begin_epoch(self) -> None:
        """Begin new means and times."""
        self.averages, self.times = Averages(), {}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, the guards' too; nothing may be pending."""
        means = self.averages
        return {
            "averages": [list(means.totals), list(means.totals.values()), means.count],
            **self.guards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        names, totals, count = state["averages"]
        self.averages = Averages(dict(zip(names, totals, strict=True)), count)
        self.guards.load_state_dict(state)
