"""Draw where the relatives of deformable attention read a map, for docs/architectures.md.

    python -m tests.benchmarks.sampling_points docs/images/sampling_points.png

One query, the star, on a map of 12 x 16 cells. Offsets are those of the modules themselves with
random weights: they show what each can reach, not what it learns.
"""

import sys
from pathlib import Path
from typing import cast

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor, nn

from models.backbones.dat import WINDOW
from models.backbones.deformable_conv import DeformableConv2d
from models.dat_attention import DATAttention
from models.encoders.msda import DILATIONS
from models.single_scale_attention import DeformAttn

HEIGHT, WIDTH, CHANNELS = 12, 16, 32
ROW, COLUMN = 5, 9  # of the query
COLOURS = ["#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666", "#a6761d", "#66a61e"]


def around(distance: int) -> Tensor:
    """Return the cells of a 3x3 kernel of this dilation. Shape: [9,2] as (x, y)."""
    steps = torch.tensor([-distance, 0, distance])
    rows, columns = torch.meshgrid(ROW + steps, COLUMN + steps, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1).float()


def deformable_convolution(x: Tensor) -> list[Tensor]:
    """Return its nine points."""
    conv = DeformableConv2d(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), "v1")
    nn.init.normal_(conv.conv_offset.weight, std=0.06)
    offset = conv.conv_offset(x)[0, :, ROW, COLUMN].view(9, 2).flip(1)
    return [around(1) + offset]


def window(_: Tensor) -> list[Tensor]:
    """Return the cells of the query's window."""
    top, left = ROW // WINDOW * WINDOW, COLUMN // WINDOW * WINDOW
    rows, columns = torch.meshgrid(
        torch.arange(top, min(top + WINDOW, HEIGHT)),
        torch.arange(left, min(left + WINDOW, WIDTH)),
        indexing="ij",
    )
    return [torch.stack([columns, rows], -1).flatten(0, 1).float()]


def deformable_attention(x: Tensor) -> list[Tensor]:
    """Return the points of each head (Eq. 2)."""
    module = DeformAttn(CHANNELS)
    nn.init.normal_(module.sampling_offsets.weight, std=0.12)
    offsets = module.sampling_offsets(x[0, :, ROW, COLUMN]).view(8, 4, 2)
    return list(torch.tensor([COLUMN, ROW]) + offsets)


def shared_points(x: Tensor) -> list[Tensor]:
    """Return DAT's points, which all queries of a group share."""
    module = DATAttention(CHANNELS, heads=2, groups=1, kernel=5, table=14, stride=2)
    cast(nn.Conv2d, module.conv_offset[3]).weight.mul_(6)
    return [module.points(module.proj_q(x))[0, 0]]


PANELS = {
    "convolution: a fixed 3 x 3": lambda x: [around(1)],
    "deformable convolution: 9 points": deformable_convolution,
    "windows (Swin, DAT): 7 x 7 cells": window,
    "dilated attention: 1, 2, 3 apart": lambda x: [around(r) for r in DILATIONS],
    "deformable attention: 8 heads x 4 points": deformable_attention,
    "DAT: points that all queries share": shared_points,
}


def draw(axes: Axes, title: str, groups: list[Tensor]) -> None:
    """Draw a map, the points of each group in a colour of its own, and the query."""
    for y in range(HEIGHT + 1):
        axes.axhline(y - 0.5, color="#dddddd", linewidth=0.6)
    for x in range(WIDTH + 1):
        axes.axvline(x - 0.5, color="#dddddd", linewidth=0.6)
    for points, colour in zip(groups, COLOURS, strict=False):
        axes.scatter(points[:, 0], points[:, 1], s=16, color=colour, zorder=3)
    axes.scatter([COLUMN], [ROW], s=110, marker="*", color="black", zorder=4)
    axes.set(xlim=(-0.5, WIDTH - 0.5), ylim=(HEIGHT - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10)


@torch.no_grad()
def main(output: Path) -> None:
    """Write the figure."""
    torch.manual_seed(0)
    x = torch.randn(1, CHANNELS, HEIGHT, WIDTH)
    figure, rows = plt.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
    for axes, (title, points) in zip(rows.flat, PANELS.items(), strict=True):
        draw(axes, title, points(x))
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
