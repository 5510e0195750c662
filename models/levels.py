"""Feature levels as one sequence of tokens, and where the tokens lie."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def valid_ratio(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the unpadded fraction of a level's width and height. Shape: [N,H,W] -> [N,2]."""
    exact = torch.promote_types(dtype, torch.float32)
    width = (~mask[:, 0]).to(exact).mean(-1)
    height = (~mask[:, :, 0]).to(exact).mean(-1)
    return torch.stack([width, height], dim=-1)
