"""Necks: what mixes the feature levels before the encoder, chosen by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from util.registry import Registry


@dataclass(frozen=True)
class NeckOptions:
    """What a neck is built from.

    `d_model` is every level's number of channels, `channels` those of the backbone's maps, and
    `width` that of the levels which a `RawNeck` adds, or None.
    """

    d_model: int
    num_levels: int
    channels: tuple[int, ...]
    width: int | None


class RawNeck(nn.Module):
    """A neck that gets the backbone's maps as they are, not projected to one width.

    It makes the levels that the backbone lacks, and projects.
    """

    def input_proj(self) -> nn.ModuleList:
        """Return what is applied to each of the backbone's maps, then what makes further levels."""
        raise NotImplementedError


# A neck maps a list of maps [N,C,H,W], finest first, to as many maps of the same shapes.
NECKS: Registry[Callable[[NeckOptions], nn.Module]] = Registry(
    "neck", __name__, {"fpn": ".fpn", "hsfpn": ".hsfpn"}
)


@NECKS.register("none")
def no_neck(options: NeckOptions) -> nn.Module:
    """Leave the levels as they are; the deformable encoder mixes them itself (Sec. 4.1)."""
    return nn.Identity()
