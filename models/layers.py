"""Small building blocks."""

from typing import Any

import torch
from torch import Tensor, nn

from models.recomputation import recomputed
from ops import fast_cpu_dropout


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return logit(x) with x clamped to eps..1-eps on either side of the fraction."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine_embedding(values: Tensor, dims: int, temperature: float = 10000.0) -> Tensor:
    """Embed scalars by sines and cosines of geometric frequencies, interleaved (Vaswani, 3.5).

    Shape: values [...] -> [..., dims]; dims is even.
    """
    index = torch.arange(dims, dtype=values.dtype, device=values.device)
    frequency = temperature ** (2 * (index // 2) / dims)
    phase = values[..., None] / frequency
    return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1).flatten(-2)


class ExactLinear(nn.Linear):
    """A linear layer that autocast leaves in the precision of its weights.

    For what becomes a place or a score: bfloat16 has 8 bits, too few to distinguish pixels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [..., in_features] -> [..., out_features]."""
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class GroupNorm(nn.GroupNorm):
    """A group norm that takes a single value in a group, too, which becomes the bias.

    PyTorch's own refuses it. A narrow model sees it in the last level of a tiny image.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N,C,H,W] -> the same."""
        cudnn = torch.backends.cudnn.enabled
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, cudnn)


class ExactLayerNorm(nn.LayerNorm):
    """A layer norm that autocast leaves in the precision of its weights, on every device.

    PyTorch's own does so on CUDA. On the CPU it would take bfloat16, in which its backward pass
    also sums the gradients of weight and bias over all tokens: sums that stop growing at 2 to 4,
    where adding one more token rounds to nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [..., C] -> the same."""
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype))


class Dropout(nn.Dropout):
    """Dropout with the cheap masks of `fast_cpu_dropout` where it runs on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [...] -> the same."""
        if self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return fast_cpu_dropout(x, self.p)
        return super().forward(x)


def without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """Return a map that is zero where there is padding, as beyond its border.

    Shape: x [N,C,H,W]; padding [N,H,W], True = padding.
    """
    return x if padding is None else x.masked_fill(padding[:, None], 0)


def checkpointed(module: nn.Module, *args: Any, enabled: bool) -> Any:
    """Call a module; if `enabled`, keep its arguments alone for the backward pass."""
    if not (enabled and torch.is_grad_enabled()):
        return module(*args)
    return recomputed(module, *args)
