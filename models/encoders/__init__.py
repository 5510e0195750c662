"""Encoders: feature levels to memory, each in a file of its own, chosen by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from models.levels import FeatureLevels
from util.registry import Registry


@dataclass(frozen=True)
class EncoderOptions:
    """What an encoder is built from."""

    d_model: int
    num_layers: int
    d_ffn: int
    dropout: float
    n_levels: int
    n_heads: int
    n_points: int


class Encoder(nn.Module):
    """Maps feature levels to the memory, a vector for each of their tokens.

    Parameters have keys under `transformer.encoder`; the transformer re-initialises matrices.
    """

    checkpointing = False  # activations are computed again in the backward pass, not kept

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the memory. Shape: [N,S,C]."""
        raise NotImplementedError


ENCODERS: Registry[Callable[[EncoderOptions], Encoder]] = Registry(
    "encoder", __name__, {"deformable": ".deformable"}
)
