"""Feature levels: the backbone's maps, where their cells lie, and all of them as one sequence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone
from models.layers import sine_embedding
from util.batch import PaddedBatch

# N batch, S tokens of all levels, L levels, C width.


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the pixel position, normalised over the unpadded area.

    Attention sees a set: without them it could not tell one place from another. Positions are
    taken at cell centres (half-cell offset), as Deformable DETR does, or where `offset` says.
    """

    def __init__(
        self, num_pos_feats: int, *, temperature: float = 10000.0, offset: float = -0.5
    ) -> None:
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.offset = offset

    def forward(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode the positions of one level.

        Shape: mask [N,H,W] bool, True = padding -> [N, 2*num_pos_feats, H, W], y before x.
        """
        valid = ~mask
        # half precision cannot count cells; float64 models are encoded in float64
        exact = torch.promote_types(dtype, torch.float32)
        axes = []
        for dim in (1, 2):
            position = valid.cumsum(dim, dtype=exact) + self.offset
            extent = valid.sum(dim, keepdim=True, dtype=exact)
            axes.append(position / (extent + 1e-6) * (2 * math.pi))
        embedded = [sine_embedding(axis, self.num_pos_feats, self.temperature) for axis in axes]
        return torch.cat(embedded, dim=-1).permute(0, 3, 1, 2).to(dtype)


class Joiner(nn.Sequential):
    """Backbone and positional encoding in one module (state-dict keys `0.*` and `1.*`)."""

    def __init__(self, backbone: Backbone, position_encoding: nn.Module) -> None:
        super().__init__(cast(nn.Module, backbone), position_encoding)
        self.mean, self.std = backbone.mean, backbone.std
        self.reads_padding = getattr(backbone, "reads_padding", False)

    def forward(self, batch: PaddedBatch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return maps [N,C,H,W], masks [N,H,W] and encodings [N,C,H,W], finest level first."""
        # channels last: convolutions are faster, and flattening maps to tokens copies nothing
        images = batch.images.contiguous(memory_format=torch.channels_last)
        maps = self[0](images, batch.mask) if self.reads_padding else self[0](images)
        located = [self.encode_position(batch.mask, m) for m in maps]
        return maps, [mask for mask, _ in located], [pos for _, pos in located]

    def encode_position(self, mask: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask, by nearest cell, and encoding for a map of a batch with this mask."""
        size = (feature_map.shape[2], feature_map.shape[3])
        shrunk = F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0].bool()
        exact = torch.promote_types(feature_map.dtype, torch.float32)
        return shrunk, self[1](shrunk, exact)


@dataclass(frozen=True)
class FeatureLevels:
    """Feature maps of all levels, flattened into one sequence.

    Shape: tokens and pos [N,S,C]; padding_mask [N,S], True = padding; valid_ratios [N,L,2], the
    unpadded fraction of each level's (width, height); sizes [L,2], those of the padded levels in
    cells; spatial_shapes (H, W) per level; class_tokens [N,T,C], of an encoder that has them.
    """

    tokens: Tensor
    pos: Tensor
    padding_mask: Tensor
    valid_ratios: Tensor
    sizes: Tensor
    spatial_shapes: list[tuple[int, int]]
    class_tokens: Tensor | None = None


def join_levels(
    features: Sequence[Tensor], masks: Sequence[Tensor], pos: Sequence[Tensor], embed: Tensor
) -> FeatureLevels:
    """Flatten maps into one sequence; each position gets its level's embedding (Sec. 4.1).

    Attention over all levels at once would not know which of them a token comes from: at one place
    the sines are the same on every level.

    Shape: features, pos L x [N,C,H,W]; masks L x [N,H,W], True = padding; embed [L,C].
    """
    # in the precision of the weights also under autocast: adding up mixed types is slow
    exact = embed.dtype
    level_pos = [p.flatten(2).mT.to(exact) + e for p, e in zip(pos, embed, strict=True)]
    shapes = [(f.shape[2], f.shape[3]) for f in features]
    valid_ratios = torch.stack([valid_ratio(m, features[0].dtype) for m in masks], dim=1)
    # filled on the device: copying from the host would wait for all work under way there
    sides = [valid_ratios.new_full((), side) for h, w in shapes for side in (w, h)]
    return FeatureLevels(
        tokens=torch.cat([f.flatten(2).mT for f in features], dim=1).to(exact),
        pos=torch.cat(level_pos, dim=1),
        padding_mask=torch.cat([m.flatten(1) for m in masks], dim=1),
        valid_ratios=valid_ratios,
        sizes=torch.stack(sides).view(-1, 2),
        spatial_shapes=shapes,
    )


def valid_ratio(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the unpadded fraction of a level's width and height. Shape: [N,H,W] -> [N,2].

    Boxes are fractions of the unpadded image, sampling points fractions of the padded level: this
    is what turns the one into the other.
    """
    exact = torch.promote_types(dtype, torch.float32)
    width = (~mask[:, 0]).to(exact).mean(-1)
    height = (~mask[:, :, 0]).to(exact).mean(-1)
    return torch.stack([width, height], dim=-1)


def grid_centres(height: int, width: int, like: Tensor) -> Tensor:
    """Return cell centres (x, y) row by row, in cells. Shape: [H*W,2]."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1)


def cell_centres(levels: FeatureLevels) -> Tensor:
    """Return each token's position as seen on every level: the encoder's references (Sec. 4.1).

    Shape: [N,S,L,2], (x, y) fractions of the padded levels.
    """
    ratios = levels.valid_ratios  # [N,L,2]
    centres = []
    for level, (height, width) in enumerate(levels.spatial_shapes):
        grid = grid_centres(height, width, ratios)  # [H*W,2], in cells
        centres.append(grid[None] / (ratios[:, None, level] * levels.sizes[level]))
    return torch.cat(centres, dim=1)[:, :, None] * ratios[:, None]
