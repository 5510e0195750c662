"""Positional encodings of feature maps."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import sine_embedding


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the pixel position, normalised over the unpadded area.

    Positions are taken at cell centres (half-cell offset), as Deformable DETR does.
    """

    def __init__(self, num_pos_feats: int, *, scale: float = 2 * math.pi) -> None:
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.scale = scale

    def forward(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode the positions of one level.

        Shape: mask [N,H,W] bool, True = padding -> [N, 2*num_pos_feats, H, W], y before x.
        """
        valid = ~mask
        # half precision cannot count cells; float64 models are encoded in float64
        exact = torch.promote_types(dtype, torch.float32)
        axes = []
        for dim in (1, 2):
            centre = valid.cumsum(dim, dtype=exact) - 0.5
            extent = valid.sum(dim, keepdim=True, dtype=exact)
            axes.append(centre / (extent + 1e-6) * self.scale)
        embedded = [sine_embedding(axis, self.num_pos_feats) for axis in axes]
        return torch.cat(embedded, dim=-1).permute(0, 3, 1, 2).to(dtype)


class PositionEmbeddingLearned(nn.Module):
    """Learned row and column tables of 50 entries, stretched over larger maps."""

    table_size = 50

    def __init__(self, num_pos_feats: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.table_size, num_pos_feats)
        self.col_embed = nn.Embedding(self.table_size, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Shape: mask [N,H,W] -> [N, 2*num_pos_feats, H, W], x before y."""
        n, height, width = mask.shape
        columns = self._entries(self.col_embed.weight, width)  # [C, W]
        rows = self._entries(self.row_embed.weight, height)  # [C, H]
        x = columns[:, None, :].expand(-1, height, -1)
        y = rows[:, :, None].expand(-1, -1, width)
        return torch.cat([x, y])[None].expand(n, -1, -1, -1).to(dtype)

    def _entries(self, table: Tensor, size: int) -> Tensor:
        if size <= self.table_size:
            return table[:size].T
        stretched = F.interpolate(table.T[None], size=size, mode="linear", align_corners=False)
        return stretched[0]


def build_position_encoding(kind: str, hidden_dim: int) -> nn.Module:
    """Return the encoding of this name."""
    if kind == "learned":
        return PositionEmbeddingLearned(hidden_dim // 2)
    return PositionEmbeddingSine(hidden_dim // 2)
