"""A feature pyramid: coarse levels are added to finer ones (FPN, arXiv 1612.03144, Sec. 3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.necks import NECKS, NeckOptions

# N batch, L levels, C width.


@NECKS.register("fpn")
class FPN(nn.Module):
    """Add each level, enlarged, to the next finer one, then smooth all of them.

    The projections to one width that precede it are the lateral ones of the paper.
    """

    def __init__(self, options: NeckOptions) -> None:
        super().__init__()
        width = options.d_model
        self.smooth = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(options.num_levels)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Shape: L x [N,C,H,W], finest first -> the same."""
        merged = [maps[-1]]
        for finer in reversed(maps[:-1]):
            merged.insert(0, finer + F.interpolate(merged[0], size=finer.shape[2:]))
        return [smooth(level) for smooth, level in zip(self.smooth, merged, strict=True)]
