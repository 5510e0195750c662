"""An exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import CheckpointError


class Ema:
    """Averages of all floating-point parameters and buffers of an unwrapped model.

    After update number n, counted from 0, an average is `d * average + (1 - d) * value` with
    d = min(decay, (1 + n) / (10 + n)): the first weights, which are random, fade soon. Averages
    are at least float32. Other values, as of counters, are the model's. What the model shares
    under several names is averaged once.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the model's present weights. `decay` is in 0..1."""
        self.decay = decay
        self.count = 0
        copies = {key: _at_least_float32(value) for key, value in _own_tensors(model).items()}
        owners = _owners(model)
        self._averages = {key: copies[owner] for key, owner in owners.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights, after an optimisation step; never waits for the device."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        averages, values = [], []
        for key, value in _own_tensors(model).items():
            average = self._averages[key]
            if value.is_floating_point():
                averages.append(average)
                values.append(value.detach().to(average.dtype))
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)
        self.count += 1

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Put the averages into the model for a while; afterwards its own weights, bit for bit."""
        tensors = _own_tensors(model)
        own = {key: value.detach().clone() for key, value in tensors.items()}
        try:
            _write(tensors, self._averages)
            yield
        finally:
            _write(tensors, own)

    def state_dict(self) -> dict[str, Any]:
        """Return `model`, the averages under the model's own keys, and `count`, the updates.

        Tensors may be those that `update` changes. As it has the key `model`, whatever loads the
        weights of a checkpoint loads these.
        """
        return {
            "model": {k: v.contiguous() for k, v in self._averages.items()},
            "count": self.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: it is of another model; nothing is changed.
        """
        saved: Mapping[str, Tensor] = state["model"]
        expected = {key: tuple(value.shape) for key, value in self._averages.items()}
        found = {key: tuple(value.shape) for key, value in saved.items()}
        if found != expected:
            name = next(k for k in (*expected, *found) if found.get(k) != expected.get(k))
            raise CheckpointError(
                f"averaged weights '{name}': expected {_shape(expected, name)}, got "
                f"{_shape(found, name)}. Resume with the model options of the checkpoint."
            )
        _write(self._averages, saved)
        self.count = int(state["count"])


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Fill tensors with the values of their names."""
    for key, tensor in tensors.items():
        tensor.copy_(values[key])


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return each stored parameter and buffer once, under its first name."""
    named: dict[int, tuple[str, Tensor]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        named.setdefault(id(value), (key, value))
    return dict(named.values())


def _owners(model: nn.Module) -> dict[str, str]:
    """Map every stored name to the first name of the same tensor."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {key: first.setdefault(id(value), key) for key, value in tensors.items()}


def _at_least_float32(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    if not value.is_floating_point():
        return copy
    return copy.to(torch.promote_types(value.dtype, torch.float32))


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"
