"""Necks: what mixes the feature levels before the encoder, chosen by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from util.registry import Registry


@dataclass(frozen=True)
class NeckOptions:
    """What a neck is built from: every level's number of channels, and how many levels come in."""

    d_model: int
    num_levels: int


# A neck maps a list of maps [N,C,H,W], finest first, to as many maps of the same shapes.
NECKS: Registry[Callable[[NeckOptions], nn.Module]] = Registry("neck", __name__, {})


@NECKS.register("none")
def no_neck(options: NeckOptions) -> nn.Module:
    """Leave the levels as they are; the deformable encoder mixes them itself (Sec. 4.1)."""
    return nn.Identity()
