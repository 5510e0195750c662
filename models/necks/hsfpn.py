"""HS-FPN: coarse levels select what passes of finer ones (MFDS-DETR, arXiv 2401.00926, Sec. 3.2).

It takes the place of the input projections: it selects among the channels of the backbone's own
maps before they have the transformer's width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import GroupNorm
from models.necks import NECKS, NeckOptions, RawNeck
from util.errors import ConfigError

# N batch, L levels, C width, K channels of a map.


class ChannelAttention(nn.Module):
    """A weight between 0 and 1 for each channel, from its mean and its maximum over the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weights. Shape: [N,K,H,W] -> [N,K,1,1]."""
        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        mean, most = (self.fc2(F.relu(self.fc1(vector))) for vector in pooled)
        weights: Tensor = (mean + most).sigmoid()
        return weights


@NECKS.register("hsfpn")
class HSFPN(RawNeck):
    """Channels of every map are weighed and projected; then coarse levels weigh finer ones.

    Only the coarsest level is handed down, enlarged step by step: what is fused is not.
    """

    def __init__(self, options: NeckOptions) -> None:
        super().__init__()
        if options.num_levels == 1:
            raise ConfigError("neck hsfpn: needs a coarse level and a fine one, not one level.")
        width, given = options.d_model, len(options.channels)
        self.source = options.channels[-1]
        self.top = options.width or 2 * self.source
        self.further = options.num_levels - given
        channels = [*options.channels, *[self.top] * self.further]
        self.select = nn.ModuleList(ChannelAttention(k) for k in channels)
        self.project = nn.ModuleList(nn.Conv2d(k, width, 1) for k in channels)
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1)
            for _ in channels[1:]
        )
        self.weigh = nn.ModuleList(ChannelAttention(width) for _ in channels[1:])
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), _norm(width), nn.ReLU())
            for _ in channels
        )

    def input_proj(self) -> nn.ModuleList:
        """Return nothing for the backbone's maps, and what makes further levels of the last."""
        sources = [self.source, *[self.top] * (self.further - 1)][: self.further]
        kept = [nn.Identity() for _ in range(len(self.project) - self.further)]
        return nn.ModuleList([*kept, *(_further_level(k, self.top) for k in sources)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Shape: L x [N,K,H,W], finest first -> L x [N,C,H,W]."""
        steps = zip(self.select, self.project, maps, strict=True)
        selected = [project(select(x) * x) for select, project, x in steps]
        handed_down = selected[-1]
        fused = [handed_down]
        for level in reversed(range(len(maps) - 1)):
            handed_down = self.enlarge[level](handed_down)
            coarse, size = handed_down, selected[level].shape[2:]
            if coarse.shape[2:] != size:
                coarse = F.interpolate(coarse, size=size, mode="bilinear")
            fused.insert(0, self.weigh[level](coarse) * selected[level] + coarse)
        return [smooth(x) for smooth, x in zip(self.smooth, fused, strict=True)]


def _further_level(channels: int, width: int) -> nn.Sequential:
    narrow = channels // 2
    return nn.Sequential(
        nn.Conv2d(channels, narrow, 1),
        nn.Conv2d(narrow, narrow, 3, stride=2, padding=1),
        nn.Conv2d(narrow, width, 1),
        _norm(width),
    )


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(32 if channels % 32 == 0 else 8, channels)
