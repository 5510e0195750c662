"""Updates of the weights: precision, updates that are dropped, and the learning rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from util.device import check_precision

_AUTOCAST: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How a training step computes, and whether its update is kept.

    The order in a step: forward within `autocast()`, `scaler.scale(loss).backward()`,
    `scaler.unscale_(optimizer)`, clip, `step`. Weights and gradients are always float32.
    `found_inf` is 1 where the last `step` was dropped and 0 where it was made: float32 [], on the
    device. `scaler` scales for fp16 alone.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """Refuse what the device cannot do; on CUDA, set how float32 products are made.

        Raises:
            ConfigError: the device has no such precision.
        """
        check_precision(name, device)
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.found_inf = torch.zeros((), device=device)
        if device.type == "cuda":  # torch's own default rounds convolutions to TF32
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            torch.backends.cudnn.allow_tf32 = name == "tf32"

    def autocast(self) -> AbstractContextManager[None]:
        """Return a new context for one forward pass of the model."""
        if self.name not in _AUTOCAST:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.name])

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Update the weights, unless the norm of their gradients is not finite.

        Then weights, moments and step counts stay as they are. A fused optimiser decides this on
        the device; others make the host wait for the norm. In fp16 the loss scale shrinks after
        gradients that are not finite, and grows after many that are.
        """
        self.found_inf = (~norm.detach().isfinite()).to(torch.float32)
        # what a checkpoint of another device says replaces the option the optimiser was built with
        if all(group.get("fused") for group in optimizer.param_groups):
            # as torch's scaler passes the flag to the fused kernel
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        elif not self.found_inf.item():
            optimizer.step()
        self.scaler.update()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate changes over a run of a length that may be known only later.

    "step": a tenth after every `drop_every` of `epochs` epochs, or after each of `drop_epochs`.
    "cosine": from 1 to 0. "flat_cosine" (DEIM, arXiv 2412.04234): 1 for the part `flat` of the
    run, then a cosine to `final`, where it stays for the last part `tail`. All start with
    `warmup_steps`, in which the rate rises in proportion to the steps, or to their square.
    """

    kind: str
    epochs: int
    drop_every: int = 1
    drop_epochs: Sequence[int] = ()
    flat: float = 0.5
    tail: float = 0.0
    final: float = 0.0
    warmup_steps: int = 0
    warmup_shape: str = "linear"

    def over(self, total: int | None) -> Callable[[int], float]:
        """Return the factor on every group's rate as a function of the steps done.

        `total` are the steps of the run. As long as it is None, the rate stays that of the start.
        """
        if total is None:
            return lambda step: self._warmup(step)  # a function, of which checkpoints keep nothing
        length = max(total, 1)
        kinds = {"step": self._step, "cosine": self._cosine, "flat_cosine": self._flat_cosine}
        shape = kinds[self.kind]
        return lambda step: self._warmup(step) * shape(step, length)

    def _warmup(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        if self.warmup_shape == "quadratic":
            return float((step / self.warmup_steps) ** 2)
        return (step + 1) / self.warmup_steps

    def _step(self, step: int, total: int) -> float:
        done = step * self.epochs  # in steps of which `total` are an epoch
        drops = sum(done >= e * total for e in self.drop_epochs)
        return float(0.1 ** (drops if self.drop_epochs else done // (total * self.drop_every)))

    def _cosine(self, step: int, total: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

    def _flat_cosine(self, step: int, total: int) -> float:
        falls, ends = round(self.flat * total), total - round(self.tail * total)
        if step <= falls:
            return 1.0
        if step >= ends:
            return self.final
        fall = 0.5 * (1 + math.cos(math.pi * (step - falls) / (ends - falls)))
        return self.final + (1 - self.final) * fall


def set_rates(scheduler: LambdaLR) -> None:
    """Set the rates of all groups to those of the schedule at its present step."""
    for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
