"""Updates of the weights: number formats, what is dropped on the device, the learning rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from util.errors import ConfigError

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
        _check_available(name, device)
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


def _check_available(name: str, device: torch.device) -> None:
    cuda = device.type == "cuda"
    instead = "fp32"
    if name == "tf32" and not (cuda and not torch.version.hip):
        needed = "a CUDA device with TensorFloat-32"
    elif name == "fp16" and not cuda:
        needed = "a CUDA device"
        instead = "bf16" if _has_bfloat16(device) else "fp32"
    elif name == "bf16" and not _has_bfloat16(device):
        needed = "a device with bfloat16"
        instead = "fp16" if cuda else "fp32"
    else:
        return
    raise ConfigError(
        f"precision {name}: needs {needed}; this one is {device.type}. Use `precision {instead}`."
    )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.amp.is_autocast_available(device.type)


def learning_rate_factor(
    kind: str,
    steps_per_epoch: int,
    *,
    epochs: int,
    warmup_steps: int,
    drop_every: int,
    drop_epochs: Sequence[int],
) -> Callable[[int], float]:
    """Return the factor on every group's rate as a function of the steps done.

    "step": a tenth after every `drop_every` epochs, or after each of `drop_epochs`. "cosine": from
    1 to 0 over all epochs. Both start with `warmup_steps` of linear warm-up.
    """
    total = max(epochs * steps_per_epoch, 1)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if kind == "cosine":
            return warmup * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
        epoch = step // max(steps_per_epoch, 1)
        drops = sum(epoch >= e for e in drop_epochs) if drop_epochs else epoch // drop_every
        return warmup * float(0.1**drops)

    return factor


def restore_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR, content: Mapping[str, Any]
) -> None:
    """Load the moments and the place in the schedule; all options are those of the run.

    `check_state` must have found both sound.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        key: {name: _laid_out_as(parameters[key], moment) for name, moment in moments.items()}
        for key, moments in content["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    saved = content["lr_scheduler"]
    place = {key: saved[key] for key in ("last_epoch", "_step_count", "_last_lr")}
    scheduler.load_state_dict({**scheduler.state_dict(), **place})
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def _laid_out_as(parameter: Tensor, moment: Tensor) -> Tensor:
    """Return a moment with the strides of its parameter, which the fused kernel relies on."""
    if moment.shape != parameter.shape or moment.stride() == parameter.stride():
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)
