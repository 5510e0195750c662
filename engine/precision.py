"""Number formats of training: autocast, the loss scale, and updates dropped on the device."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from util.errors import ConfigError

_AUTOCAST: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How a training step computes, and whether its update is kept.

    The order in a step: forward within `autocast()`, `scale(loss).backward()`, `unscale_`, clip,
    `step`. Weights and gradients are always float32. `found_inf` is 1 where the last `step` was
    dropped and 0 where it was made: float32 [], on the device. `scaler` works for fp16 alone.
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

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to call `backward` on."""
        return self.scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale, once a step and before they are clipped."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Update the weights, unless the norm of their gradients is not finite.

        Then weights, moments and step counts stay as they are. A fused optimiser decides this on
        the device; others make the host wait for the norm. In fp16 the loss scale shrinks after
        gradients that are not finite, and grows after many that are.
        """
        self.found_inf = (~norm.detach().isfinite()).to(torch.float32)
        # what a checkpoint of another device says replaces the option the optimiser was built with
        if all(group.get("fused") for group in optimizer.param_groups):
            self._step_on_device(optimizer)
        elif not self.found_inf.item():
            optimizer.step()
        self.scaler.update()

    def _step_on_device(self, optimizer: torch.optim.Optimizer) -> None:
        """Pass the flag to the fused kernel, by the attributes that torch's scaler uses."""
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]

    def current_scale(self) -> float:
        """Return the loss scale, 1 where there is none; waits for the device."""
        return float(self.scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale's state as plain values; empty where there is none."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a loss scale; nothing changes for a run that had none, or needs none."""
        if state:
            self.scaler.load_state_dict(dict(state))


def _check_available(name: str, device: torch.device) -> None:
    kind = device.type
    if name == "tf32" and (kind != "cuda" or torch.version.hip):
        raise ConfigError(
            f"precision tf32: needs a CUDA device; {kind} has no TensorFloat-32. "
            "Use `precision fp32`."
        )
    if name == "fp16" and kind != "cuda":
        raise ConfigError(
            f"precision fp16: needs a CUDA device, not {kind}. Use `precision bf16`, which has the "
            "range of float32, or fp32."
        )
    if name == "bf16" and not _has_bfloat16(device):
        other = "fp16" if kind == "cuda" else "fp32"
        raise ConfigError(
            f"precision bf16: this {kind} device has no bfloat16. Use `precision {other}`."
        )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.amp.is_autocast_available(device.type)
