"""Encoders: feature levels to memory, each in a file of its own, chosen by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from models.levels import FeatureLevels
from util.registry import Registry


@dataclass(frozen=True)
class EncoderOptions:
    """What an encoder is built from.

    Of the deformable one alone: `fusion` says what the memory is made of, "none" for the last
    layer's tokens, `updates` which tokens a layer changes, and the others are options of that.
    `attention` names what a layer of the mixed one attends with, with "+" between several;
    `dat_stride` is an option of DAT's, `num_classes` of the one that has a token for each class.
    """

    d_model: int
    num_layers: int
    d_ffn: int
    dropout: float
    n_levels: int
    n_heads: int
    n_points: int
    fusion: str = "none"
    updates: str = "full"
    lite_levels: int = 1
    lite_expansion: int = 1
    rho: float = 0.3
    attention: str = "deformable"
    dat_stride: int = 1
    num_classes: int = 0


class Encoder(nn.Module):
    """Maps feature levels to the memory, a vector for each of their tokens.

    Parameters have keys under `transformer.encoder`; the transformer re-initialises matrices.
    """

    checkpointing = False  # activations are computed again in the backward pass, not kept

    def forward(self, levels: FeatureLevels) -> Tensor | tuple[Tensor, Tensor]:
        """Return the memory and, if the encoder has them, class tokens. Shape: [N,S,C], [N,T,C]."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set what must not start like an ordinary matrix."""


ENCODERS: Registry[Callable[[EncoderOptions], Encoder]] = Registry(
    "encoder", __name__, {"mixed": ".mixed", "enhancer": ".enhancer"}
)
# The deformable encoder, by which tokens its layers change.
UPDATES: Registry[Callable[[EncoderOptions], Encoder]] = Registry(
    "encoder_updates", __name__, {"full": ".deformable", "lite": ".lite", "sparse": ".sparse"}
)


@ENCODERS.register("deformable")
def deformable_encoder(options: EncoderOptions) -> Encoder:
    """Return the encoder whose layers change the tokens that `options.updates` says."""
    return UPDATES[options.updates](options)
