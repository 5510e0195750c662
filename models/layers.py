"""Small building blocks."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class MLP(nn.Module):
    """Linear layers with ReLU between them: the box head."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )

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

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N,C,H,W] -> the same."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def focal_prior_bias(prior: float = 0.01) -> float:
    """Return the bias that makes a sigmoid head start at probability `prior` (RetinaNet, 4.1)."""
    return -math.log((1 - prior) / prior)
