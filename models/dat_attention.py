"""Deformable attention of DAT: all queries share one set of points, which follow the image.

Xia et al., Vision Transformer with Deformable Attention, arXiv 2201.00520, Sec. 3.2.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ExactLayerNorm, without_padding

Grid = Literal["corrected", "published"]

# N batch, C channels, H and W cells of the map, M heads, D channels per head, G groups of points,
# P points per group.


class ChannelNorm(ExactLayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N,C,H,W] -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DATAttention(nn.Module):
    """Attention of every cell to points that a small network moves away from a regular grid.

    Each group of channels has points of its own: an offset network reads the queries and gives
    each point (y, x), bounded by tanh. Keys and values are made of the map at the points, between
    cells bilinearly, zero beyond the image. A learned table adds a bias by how a point lies to
    the query, as a part of the image: it has the size of the maps that it was trained on, and is
    stretched over others.

    `grid` "corrected": without offsets, points are the cells themselves. "published": those of the
    first release, at (i + 0.5) / H of the distance between the first cell and the last, which are
    cells nowhere, and depend on the size of the map.

    `offset_range`: how far a point may move, in halves of the distance between points. `stride`:
    cells from point to point. `kernel`: cells that the offset network sees. `table`: side of the
    maps that the bias table is for, in cells.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        groups: int,
        kernel: int,
        table: int,
        stride: int = 1,
        offset_range: float = 2.0,
        grid: Grid = "corrected",
    ) -> None:
        super().__init__()
        assert channels % heads == heads % groups == 0
        assert kernel % 2 == 1
        self.heads, self.groups, self.stride = heads, groups, stride
        self.offset_range, self.grid = offset_range, grid
        width = channels // groups
        self.conv_offset = nn.Sequential(
            nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width),
            ChannelNorm(width),
            nn.GELU(),
            nn.Conv2d(width, 2, 1, bias=False),
        )
        self.proj_q = nn.Conv2d(channels, channels, 1)
        self.proj_k = nn.Conv2d(channels, channels, 1)
        self.proj_v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.rpe_table = nn.Parameter(torch.zeros(heads, 2 * table - 1, 2 * table - 1))
        nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def forward(
        self, x: Tensor, padding: Tensor | None = None, pos: Tensor | None = None
    ) -> Tensor:
        """Attend. What is padding is neither sampled nor does it change any other cell.

        `pos` is added to what queries and keys are made of.

        Shape: x, pos [N,C,H,W]; padding [N,H,W], True = padding -> [N,C,H,W].
        """
        x = without_padding(x, padding)
        placed = x if pos is None else without_padding(x + pos, padding)
        q = self.proj_q(placed)
        points = self.points(q, padding)
        sampled = self._sample(x, points)  # [N,C,1,P]
        k = self.proj_k(sampled if pos is None else self._sample(placed, points))
        v = self.proj_v(sampled)
        q, k, v = (
            t.reshape(x.shape[0], self.heads, -1, t.shape[2] * t.shape[3]).mT for t in (q, k, v)
        )
        bias = self.position_bias(points, x, padding)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y: Tensor = self.proj_out(found.mT.reshape(x.shape))
        return y

    def points(self, q: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return where keys and values are read, (x, y) in cells, 0 the centre of the first cell.

        Shape: q [N,C,H,W]; padding [N,H,W] -> [N,G,P,2].
        """
        height, width = q.shape[2:]
        by_group = self._by_group(without_padding(q, padding))
        raw = self.conv_offset(by_group)  # [N*G,2,rows,columns], (y, x)
        exact = torch.promote_types(raw.dtype, torch.float32)  # 8 bits distinguish no cells
        moved = raw.to(exact).tanh() * (self.offset_range / 2)
        axes = []
        for axis, size in ((1, width), (0, height)):
            count = raw.shape[2 + axis]
            start = torch.arange(count, dtype=exact, device=raw.device)
            start = start[:, None] if axis == 0 else start[None]
            if self.grid == "corrected":
                place = (start + moved[:, axis]) * self.stride
            else:
                place = (start + 0.5 + moved[:, axis]) * ((size - 1) / count)
            axes.append(place.flatten(1))
        return torch.stack(axes, -1).view(q.shape[0], self.groups, -1, 2)

    def _by_group(self, x: Tensor) -> Tensor:
        """Return the channels of each group as a map. Shape: [N,C,H,W] -> [N*G,C/G,H,W]."""
        return x.reshape(x.shape[0] * self.groups, -1, *x.shape[2:])

    def _sample(self, x: Tensor, points: Tensor) -> Tensor:
        """Return the map at the points of each group. Shape: [N,C,H,W] -> [N,C,1,P]."""
        size = _sides(x, points)
        where = ((2 * points + 1) / size - 1).flatten(0, 1)[:, None]  # [N*G,1,P,2]
        by_group = self._by_group(x).to(where.dtype)
        found = F.grid_sample(by_group, where, align_corners=False)  # [N*G,C/G,1,P]
        return found.view(x.shape[0], x.shape[1], 1, -1)

    def position_bias(self, points: Tensor, x: Tensor, padding: Tensor | None) -> Tensor:
        """Return what is added to the products of queries and keys; -inf where a key is padding.

        Shape: points [N,G,P,2]; x [N,C,H,W] -> [N,M,H*W,P].
        """
        batch, (height, width) = x.shape[0], x.shape[2:]
        sides = _sides(x, points).expand(batch, 2)
        if padding is not None and self.grid == "corrected":  # of the image, without its padding
            sides = torch.stack([(~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)], 1)
        span = (sides - 1).clamp(min=1).to(points.dtype)[:, None, None]  # [N,1,1,2]
        y = torch.arange(height, dtype=points.dtype, device=points.device)
        x_ = torch.arange(width, dtype=points.dtype, device=points.device)
        cells = torch.stack(torch.meshgrid(x_, y, indexing="xy"), -1).flatten(0, 1)  # [H*W,2]
        if self.grid == "corrected":
            query = cells / span
        else:
            query = ((cells + 0.5) / sides[0]).expand(batch, 1, -1, -1)
        between = query[:, :, :, None] - (points / span)[:, :, None]  # [N,G,H*W,P,2], -1..1
        table = self.rpe_table.to(points.dtype).expand(batch, -1, -1, -1)
        bias = F.grid_sample(self._by_group(table), between.flatten(0, 1), align_corners=True)
        bias = bias.view(batch, self.heads, height * width, -1)  # from [N*G,M/G,H*W,P]
        if padding is None:
            return bias
        keys = padding[:, :: self.stride, :: self.stride].flatten(1)
        return bias.masked_fill(keys[:, None, None], -torch.inf)


def _sides(x: Tensor, like: Tensor) -> Tensor:
    """Return (width, height) of a map, of sizes that a file leaves open, too. Shape: -> [2]."""
    return torch.stack([like.new_full((), side) for side in (x.shape[3], x.shape[2])])
