"""Small building blocks."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class MLP(nn.Module):
    """Linear layers with ReLU between them, the last one exact: the box head."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1)]
        hidden = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.layers = nn.ModuleList([*hidden, ExactLinear(hidden_dim, output_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [..., input_dim] -> [..., output_dim]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        output: Tensor = self.layers[-1](x)
        return output


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters never change."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # ImageNet weights come from an ordinary batch norm, which counts its batches.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def after(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Return this norm of `conv(x)` by one convolution with scaled weights.

        The norm's own pass over the map, and its copy of the map for the backward pass, are saved.
        Shape: x [N,C,H,W].
        """
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return F.conv2d(
            x,
            conv.weight * scale[:, None, None, None],
            self.bias - self.running_mean * scale,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Return a convolution, which has no bias of its own, and its norm. Shape: [N,C,H,W]."""
    if isinstance(norm, FrozenBatchNorm2d):
        return norm.after(conv, x)
    output: Tensor = norm(conv(x))
    return output


def focal_prior_bias(prior: float = 0.01) -> float:
    """Return the bias that makes a sigmoid head start at probability `prior` (RetinaNet, 4.1)."""
    return -math.log((1 - prior) / prior)
