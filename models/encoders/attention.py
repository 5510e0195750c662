"""What an encoder layer attends with, besides deformable attention: the contract, and the names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.encoders import EncoderOptions
from models.levels import FeatureLevels
from util.errors import ConfigError, nearest_hint
from util.registry import Registry

# N batch, S tokens of all levels, H and W cells of a level, C width.

DEFORMABLE, ENHANCER = "deformable", "enhancer"
JOINING = {DEFORMABLE, ENHANCER}  # in these, tokens of all levels see each other


class EncoderAttention(nn.Module):
    """Attention within each level: tokens and levels in, tokens out.

    Padded tokens change no other. The residual connection and the norm around it are the layer's.
    """

    def forward(self, x: Tensor, levels: FeatureLevels) -> Tensor:
        """Let the tokens of each level look at each other. Shape: x [N,S,C] -> the same."""
        lengths = [height * width for height, width in levels.spatial_shapes]
        parts = (torch.split(t, lengths, dim=1) for t in (x, levels.pos, levels.padding_mask))
        attended = [
            self.attend(*(t.unflatten(1, shape) for t in level)).flatten(1, 2)
            for *level, shape in zip(*parts, levels.spatial_shapes, strict=True)
        ]
        return torch.cat(attended, dim=1)

    def attend(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend within one level.

        Shape: x, pos [N,H,W,C]; padding_mask [N,H,W], True = padding; returns [N,H,W,C], with
            finite numbers, which do not matter, where there is padding.
        """
        raise NotImplementedError

    def kept(self, height: int, width: int) -> int:
        """Return how many numbers the weights of one level and image take for the backward pass."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set what must not start like an ordinary matrix."""


ATTENTIONS: Registry[Callable[[EncoderOptions], EncoderAttention]] = Registry(
    "encoder_attn",
    __package__,
    {"dense": ".dense", "mswin": ".mswin", "msda": ".msda", "dat": ".dat"},
)


def attention_names(given: str) -> list[str]:
    """Return what a layer attends with, one after the other, from names with "+" between them.

    Raises:
        ConfigError: there is none of a name, or these cannot follow each other.
    """
    names = given.split("+")
    if ENHANCER in names:
        raise ConfigError(
            f"encoder_attn {given}: {ENHANCER} comes alone, as it ends with deformable attention. "
            f"Choose {ENHANCER}, or others."
        )
    for name in names:
        if name not in (known := [DEFORMABLE, *ATTENTIONS]):
            raise ConfigError(
                f"encoder_attn {given}: '{name}' does not exist. {nearest_hint(name, known)}"
            )
    if DEFORMABLE in names[:-1]:
        others = [name for name in names if name != DEFORMABLE]
        raise ConfigError(
            f"encoder_attn {given}: deformable attention comes last, and once. "
            f"Write {'+'.join([*others, DEFORMABLE])}."
        )
    return names
