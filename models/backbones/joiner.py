"""A backbone joined with the positional encoding of its maps."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.registry import Backbone
from util.batch import PaddedBatch


def shrink_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Return the padding mask at a map's size, by nearest cell. Shape: [N,H,W] -> [N,h,w]."""
    return F.interpolate(mask[:, None].float(), size=(height, width), mode="nearest")[:, 0].bool()


class Joiner(nn.Sequential):
    """Backbone and positional encoding in one module (state-dict keys `0.*` and `1.*`)."""

    def __init__(self, backbone: Backbone, position_encoding: nn.Module) -> None:
        super().__init__(cast(nn.Module, backbone), position_encoding)
        self.channels = backbone.channels
        self.mean = backbone.mean
        self.std = backbone.std

    @property
    def backbone(self) -> Backbone:
        """The backbone alone."""
        return cast(Backbone, self[0])

    def forward(self, batch: PaddedBatch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return maps [N,C,H,W], masks [N,H,W] and encodings [N,C,H,W], finest level first."""
        # channels last: convolutions are faster, and flattening maps to tokens copies nothing
        maps = self[0](batch.images.contiguous(memory_format=torch.channels_last))
        located = [self.encode_position(batch.mask, m) for m in maps]
        return maps, [mask for mask, _ in located], [pos for _, pos in located]

    def encode_position(self, mask: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask and encoding for a map made from a batch with this padding mask."""
        shrunk = shrink_mask(mask, feature_map.shape[2], feature_map.shape[3])
        exact = torch.promote_types(feature_map.dtype, torch.float32)
        return shrunk, self[1](shrunk, exact)
