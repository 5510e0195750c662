"""An exponential moving average of a model's weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.weights.transfer import load_strict

_Tensors = list[Tensor] | tuple[Tensor, ...]


class Ema:
    """A copy of an unwrapped model, with averages of its parameters and buffers.

    After update number n, counted from 0, an average is `d * average + (1 - d) * value`. The first
    weights, which are random, fade soon: d = min(decay, (1 + n) / (10 + n)) or, with a `tau`,
    d = decay * (1 - exp(-(n + 1) / tau)) as in RT-DETR. Integers, such as counters, are copied.
    What the model shares under several names is averaged once. `model` has the averages, and can
    be evaluated.
    """

    def __init__(self, model: nn.Module, decay: float, tau: float = 0.0) -> None:
        """Start from the model's present weights. `decay` is in 0..1, `tau` in updates or 0."""
        self.decay, self.tau = decay, tau
        self.count = 0
        self._averaged = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self._averaged.n_averaged.fill_(1)  # at 0 it would only copy the model
        self.model: nn.Module = self._averaged.module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights, after an optimisation step; never waits for the device."""
        self._averaged.update_parameters(model)
        self.count += 1

    def _average(self, averages: _Tensors, values: _Tensors, _: Tensor | int) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - self.present_decay)
        else:
            torch._foreach_copy_(averages, values)

    @property
    def present_decay(self) -> float:
        """Return the decay of the next update."""
        if self.tau:
            return self.decay * -math.expm1(-(self.count + 1) / self.tau)
        return min(self.decay, (1 + self.count) / (10 + self.count))

    def state_dict(self) -> dict[str, Any]:
        """Return `model`, the averages under the model's own keys, and `count`, the updates.

        Tensors may be those that `update` changes. As it has the key `model`, whatever loads the
        weights of a checkpoint loads these.
        """
        tensors = {k: v.contiguous() for k, v in self.model.state_dict().items()}
        return {"model": tensors, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it is of another model; nothing is changed.
        """
        load_strict(self.model, state["model"], "averaged weights")
        self.count = int(state["count"])
