"""The learned positional encoding, an alternative to the sines of `models/levels.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
