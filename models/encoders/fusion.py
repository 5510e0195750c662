"""Memory made of the tokens before and after every layer of an encoder."""

import torch
from torch import Tensor, nn

from models.encoders import EncoderOptions
from models.layers import ExactLayerNorm


def dense_fusion(options: EncoderOptions) -> nn.Module | None:
    """Return "dense", one linear layer and a norm, or None (arXiv 2304.04742, Sec. 3.4)."""
    if options.fusion != "dense":
        return None
    linear = nn.Linear(options.d_model * (options.num_layers + 1), options.d_model)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, ExactLayerNorm(options.d_model))


def mlp_fusion(options: EncoderOptions) -> nn.Module | None:
    """Return "mlp", two linear layers and a norm, or None (Relation-DETR, arXiv 2407.11699)."""
    if options.fusion != "mlp":
        return None
    width = options.d_model
    first, second = nn.Linear(width * (options.num_layers + 1), width), nn.Linear(width, width)
    return nn.Sequential(first, nn.ReLU(), second, ExactLayerNorm(width))


def fused(fusion: nn.Module, states: list[Tensor]) -> Tensor:
    """Return the memory made of the tokens at every depth. Shape: [N,S,C] each."""
    memory: Tensor = fusion(torch.cat(states, dim=-1))
    return memory
