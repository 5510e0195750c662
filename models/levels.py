"""Feature levels as one sequence of tokens, and where the tokens lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    shapes = [(int(f.shape[2]), int(f.shape[3])) for f in features]
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
