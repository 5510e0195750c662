"""The deformable encoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpointing import checkpointed
from models.layers import Dropout, ExactLayerNorm
from ops import MSDeformAttn

# N batch, S tokens of all levels, L levels, C width.


@dataclass(frozen=True)
class FeatureLevels:
    """Feature maps of all levels, flattened into one sequence.

    Shape: tokens and pos [N,S,C]; padding_mask [N,S], True = padding; valid_ratios [N,L,2], the
    unpadded fraction of each level's (width, height); sizes [L,2], those of the padded levels in
    cells; spatial_shapes (H, W) per level.
    """

    tokens: Tensor
    pos: Tensor
    padding_mask: Tensor
    valid_ratios: Tensor
    sizes: Tensor
    spatial_shapes: list[tuple[int, int]]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block."""

    def __init__(
        self,
        d_model: int,
        *,
        d_ffn: int,
        dropout: float,
        n_levels: int,
        n_heads: int,
        n_points: int,
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(
            d_model, n_levels=n_levels, n_heads=n_heads, n_points=n_points
        )
        self.norm1 = ExactLayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm2 = ExactLayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, levels: FeatureLevels, reference_points: Tensor) -> Tensor:
        """Shape: x [N,S,C]; reference_points [N,S,L,2]; returns [N,S,C]."""
        attended = self.self_attn(
            x + levels.pos,
            reference_points,
            x,
            levels.spatial_shapes,
            input_padding_mask=levels.padding_mask,
        )
        x = self.norm1(x + self.dropout(attended.to(x.dtype)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        output: Tensor = self.norm2(x + self.dropout(self.linear2(hidden).to(x.dtype)))
        return output


class DeformableEncoder(nn.Module):
    """A stack of encoder layers; each token's reference is its own cell centre."""

    checkpointing = False

    def __init__(self, layers: list[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the memory. Shape: [N,S,C]."""
        reference_points = cell_centres(levels)
        x = levels.tokens
        for layer in self.layers:
            x = checkpointed(layer, x, levels, reference_points, enabled=self.checkpointing)
        return x


def cell_centres(levels: FeatureLevels) -> Tensor:
    """Return each token's position as seen on every level. Shape: [N,S,L,2], (x, y) fractions."""
    ratios = levels.valid_ratios  # [N,L,2]
    centres = []
    for level, (height, width) in enumerate(levels.spatial_shapes):
        grid = grid_centres(height, width, ratios)  # [H*W,2], in cells
        centres.append(grid[None] / (ratios[:, None, level] * levels.sizes[level]))
    return torch.cat(centres, dim=1)[:, :, None] * ratios[:, None]


def grid_centres(height: int, width: int, like: Tensor) -> Tensor:
    """Return cell centres (x, y) row by row, in cells. Shape: [H*W,2]."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1)
