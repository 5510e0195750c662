"""Training steps."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from util.batch import Batch, Target
from util.errors import UserError
from util.run_log import RunLog, console


class Criterion(Protocol):
    """Outputs and targets to unweighted losses and `loss`, their weighted sum."""

    def __call__(self, outputs: Any, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the losses by name."""

    def weight(self, name: str) -> float | None:
        """Return a loss's coefficient, None for what is only reported."""


@dataclass
class Averages:
    """Running means of values that stay on the device until they are read."""

    names: list[str] = field(default_factory=list)
    total: Tensor | None = None
    count: int = 0

    def add(self, names: list[str], values: Tensor) -> None:
        """Add one step's values. Shape: [len(names)]."""
        self.names = names
        if self.total is None:  # summed in double precision, where the device has it
            exact = torch.float32 if values.device.type == "mps" else torch.float64
            self.total = torch.zeros_like(values, dtype=exact)
        self.total = self.total + values
        self.count += 1

    def means(self) -> dict[str, float]:
        """Return the mean of each value; empty when nothing was added."""
        if self.total is None:
            return {}
        return dict(zip(self.names, (self.total / self.count).tolist(), strict=True))


def official_log_values(values: Mapping[str, float], criterion: Criterion) -> dict[str, float]:
    """Name losses as official logs do: weighted under the bare name, raw under `_unscaled`."""
    named: dict[str, float] = {}
    for name, value in values.items():
        weight = criterion.weight(name)
        named[name] = value if weight is None else value * weight
        if weight is not None:
            named[f"{name}_unscaled"] = value
    return named


class UnreadableImages:
    """Names each picture that cannot be read once, and counts them."""

    def __init__(self) -> None:
        self.paths: set[str] = set()

    def report(self, batch: Batch) -> None:
        """Print the batch's unreadable pictures that were not printed before."""
        for image in batch.unreadable:
            if image.path not in self.paths:
                self.paths.add(image.path)
                console(
                    f"warning: image {image.image_id} '{image.path}' cannot be read "
                    f"({image.reason}); going on without it."
                )


@dataclass
class StepRunner:
    """One optimisation step after another, with their values logged in blocks.

    Values leave the device once every `flush_every` steps, so that logging never waits for it.
    """

    model: nn.Module
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    device: torch.device
    log: RunLog
    clip_max_norm: float
    flush_every: int = 10
    step: int = 0
    unreadable: UnreadableImages = field(default_factory=UnreadableImages)
    _pending: list[tuple[int, list[str], Tensor, dict[str, float]]] = field(default_factory=list)

    def run(
        self,
        batches: Iterable[Batch],
        on_step: Callable[[Mapping[str, float] | None], bool],
    ) -> dict[str, float]:
        """Train on every batch; stop early when `on_step` returns True.

        `on_step` gets the latest values each time a block of steps has been logged, else None.
        Returns the means over the batches.
        """
        self.model.train()
        averages = Averages()
        waiting = time.perf_counter()
        for batch in batches:
            data_time = time.perf_counter() - waiting
            self.unreadable.report(batch)
            if batch.images is not None:
                names, values = self._step(batch)
                averages.add(names, values)
                rates = {f"lr_{g['name']}": g["lr"] for g in self.optimizer.param_groups}
                seconds = {"data_time": data_time, "time": time.perf_counter() - waiting}
                self._pending.append((self.step, names, values, {**rates, **seconds}))
                self.scheduler.step()
            self.step += 1
            latest = self.flush() if self.step % self.flush_every == 0 else None
            waiting = time.perf_counter()
            if on_step(latest):
                break
        self.flush()
        return official_log_values(averages.means(), self.criterion)

    def _step(self, batch: Batch) -> tuple[list[str], Tensor]:
        """Forward, backward, update; return names and values, still on the device."""
        assert batch.images is not None
        try:
            losses = self.criterion(self.model(batch.images.to(self.device)), batch.targets)
        except FloatingPointError as error:
            images = ", ".join(str(int(t["image_id"])) for t in batch.targets)
            raise diverged(f"step {self.step} (images {images})", str(error)) from error
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(
            (p for g in self.optimizer.param_groups for p in g["params"]),
            self.clip_max_norm if self.clip_max_norm > 0 else float("inf"),
        )
        self.optimizer.step()
        values = {**losses, "grad_norm": norm}
        return list(values), torch.stack([v.detach().float() for v in values.values()])

    def flush(self) -> dict[str, float] | None:
        """Write what is pending to the logs; return the last step's values."""
        if not self._pending:
            return None
        rows = torch.stack([values for _, _, values, _ in self._pending]).tolist()
        latest: dict[str, float] = {}
        for (step, names, _, extra), row in zip(self._pending, rows, strict=True):
            latest = official_log_values(dict(zip(names, row, strict=True)), self.criterion)
            self.log.step(step, {**latest, **extra})
            if not math.isfinite(latest["loss"] + latest["grad_norm"]):
                raise diverged(f"step {step}", "the loss or its gradient is not finite")
        self._pending.clear()
        return latest


def diverged(place: str, reason: str) -> UserError:
    """Return the error of a run whose numbers are no longer finite."""
    return UserError(
        f"{place}: {reason}. The run diverged or the data is not finite: resume from last.pth "
        "with a lower --lr, or start anew with --warmup_steps."
    )
