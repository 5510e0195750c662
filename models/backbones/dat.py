"""DAT: windows of attention, and deformable attention in its last two stages.

Xia et al., Vision Transformer with Deformable Attention, arXiv 2201.00520 (the models of 2022).
"""

import re
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from torch import Tensor, nn

from models.backbones import BACKBONES, Backbone, BackboneOptions
from models.backbones.published import OUTPUT_NORMS, drop_path_rates, load_published
from models.dat_attention import ChannelNorm, DATAttention
from models.layers import checkpointed, without_padding
from util.errors import ConfigError, nearest_hint

WINDOW = 7  # cells; images of 224 pixels have 8, 4, 2 windows and 1 in a row
_NEVER = -1e4  # added to a product: its weight is zero, also where a whole window is padding


@dataclass(frozen=True)
class Size:
    """Width of the first stage, which doubles from stage to stage; blocks and heads of each."""

    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    groups: tuple[int, int]  # of points, in the last two stages


SIZES = {
    "tiny": Size(96, (2, 2, 6, 2), (3, 6, 12, 24), (3, 6)),
    "small": Size(96, (2, 2, 18, 2), (3, 6, 12, 24), (3, 6)),
    "base": Size(128, (2, 2, 18, 2), (4, 8, 16, 32), (4, 8)),
}
_KERNELS, _TABLES = (5, 3), (14, 7)  # of the last two stages: offset networks, sides of their maps


class WindowAttention(nn.Module):
    """Attention of the cells of a window among each other, with a bias by relative place.

    `shift`: cells by which windows start later than the map. What is beyond the map or padding is
    a key for nobody.
    """

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, *, window: int = WINDOW, shift: int = 0) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.before = (window - shift) % window  # cells of the first window that precede the map
        self.proj_qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)
        side = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(side * side, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)
        cell = torch.arange(window * window)
        y, x = cell // window, cell % window
        index = (y[:, None] - y + window - 1) * side + x[:, None] - x + window - 1
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Shape: x [N,C,H,W]; padding [N,H,W], True = padding -> [N,C,H,W]."""
        batch, _, height, width = x.shape
        size, before = self.window, self.before
        rows, columns = -(-(height + before) // size), -(-(width + before) // size)
        around = (before, columns * size - width - before, before, rows * size - height - before)
        if padding is None:
            padding = torch.zeros(1, height, width, dtype=torch.bool, device=x.device)
        outside = F.pad(padding, around, value=True).expand(batch, -1, -1)
        windows = self._split(F.pad(x, around).permute(0, 2, 3, 1))  # [N*windows,cells,C]
        qkv: Tensor = self.proj_qkv(windows)
        heads = qkv.view(len(windows), size * size, 3, self.heads, -1)
        q, k, v = (t.transpose(1, 2) for t in heads.unbind(2))
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        keys = self._split(outside[..., None])[:, None, None, :, 0]
        bias = bias + torch.zeros_like(keys, dtype=bias.dtype).masked_fill(keys, _NEVER)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y: Tensor = self.proj_out(found.transpose(1, 2).flatten(2))
        y = y.view(batch, rows, columns, size, size, -1).transpose(2, 3)
        y = y.reshape(batch, rows * size, columns * size, -1).permute(0, 3, 1, 2)
        return y[:, :, before : before + height, before : before + width]

    def _split(self, x: Tensor) -> Tensor:
        """Return the windows of a map, row by row. Shape: [N,H,W,C] -> [N*windows,cells,C]."""
        batch, height, width, channels = x.shape
        size = self.window
        x = x.reshape(batch, height // size, size, width // size, size, channels)
        return x.transpose(2, 3).reshape(-1, size * size, channels)


class Block(nn.Module):
    """Attention and a feed-forward block, each after a norm and added to its input."""

    def __init__(self, channels: int, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = ChannelNorm(channels), attention
        self.norm2 = ChannelNorm(channels)
        self.mlp = nn.Sequential()
        self.mlp.add_module("linear1", nn.Linear(channels, 4 * channels))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("linear2", nn.Linear(4 * channels, channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Shape: x [N,C,H,W]; padding [N,H,W] -> [N,C,H,W]."""
        x = x + self.drop_path(self.attn(self.norm1(x), padding))
        expanded: Tensor = self.mlp(self.norm2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y: Tensor = x + self.drop_path(expanded)
        return y


class DAT(nn.Module):
    """Maps of strides 8, 16 and 32, or the last alone, each after a norm of its own."""

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    checkpointing = False
    reads_padding = True

    def __init__(self, size: Size, options: BackboneOptions) -> None:
        super().__init__()
        widths = [size.width * 2**i for i in range(4)]
        self.patch_proj = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0]))
        self.stages, self.down_projs = nn.ModuleList(), nn.ModuleList()
        rates = drop_path_rates(options, size.depths)
        for i, (width, of_stage) in enumerate(zip(widths, rates, strict=True)):
            self.stages.append(
                nn.ModuleList(
                    Block(width, self._attention(size, i, d, options), rate)
                    for d, rate in enumerate(of_stage)
                )
            )
            if i < 3:
                down = nn.Conv2d(width, 2 * width, 2, 2, bias=False)
                self.down_projs.append(nn.Sequential(down, ChannelNorm(2 * width)))
        self._first = 3 if options.single_level else 1
        self.channels = tuple(widths[self._first :])
        self.strides = (4, 8, 16, 32)[self._first :]
        self.norms = nn.ModuleDict({str(i): ChannelNorm(widths[i]) for i in range(self._first, 4)})

    @staticmethod
    def _attention(size: Size, stage: int, block: int, options: BackboneOptions) -> nn.Module:
        width, heads = size.width * 2**stage, size.heads[stage]
        if block % 2 == 0:
            return WindowAttention(width, heads)
        if stage < 2:
            return WindowAttention(width, heads, shift=-(-WINDOW // 2))
        return DATAttention(
            width,
            heads=heads,
            groups=size.groups[stage - 2],
            kernel=_KERNELS[stage - 2],
            table=_TABLES[stage - 2],
            stride=options.dat_stride,
            grid=options.dat_grid,
        )

    def forward(self, images: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """Return maps, finest first; padding is no part of any image.

        Shape: images [N,3,H,W]; padding [N,H,W], True = padding -> maps [N,C,H/stride,W/stride].
        """
        x = self.patch_proj(_to_multiple(without_padding(images, padding), 4))
        padding = None if padding is None else padding[:, ::4, ::4]
        maps = []
        for i, stage in enumerate(self.stages):
            for block in cast(nn.ModuleList, stage):
                x = checkpointed(block, x, padding, enabled=self.checkpointing)
            if i >= self._first:
                maps.append(self.norms[str(i)](x))
            if i < 3:
                x = self.down_projs[i](_to_multiple(without_padding(x, padding), 2))
                padding = None if padding is None else padding[:, ::2, ::2]
        return maps


def _to_multiple(x: Tensor, size: int) -> Tensor:
    """Add zeros below and to the right. Shape: [N,C,H,W] -> multiples of `size`."""
    return F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size))


def published_name(name: str) -> str:
    """Return the name of a tensor in the files of LeapLabTHU/DAT."""
    in_block = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(\w+)\.(.+)", name)
    if in_block:
        stage, block, part, rest = in_block.groups()
        if part.startswith("norm"):
            index = 2 * int(block) + int(part.removeprefix("norm")) - 1
            return f"stages.{stage}.layer_norms.{index}.norm.{rest}"
        if part == "mlp":
            return f"stages.{stage}.mlps.{block}.chunk.{rest}"
        rest = rest.replace("conv_offset.1.", "conv_offset.1.norm.")
        return f"stages.{stage}.attns.{block}.{rest}"
    after_conv = re.fullmatch(rf"(patch_proj\.1|down_projs\.\d\.1|{OUTPUT_NORMS}\d)\.(.+)", name)
    return f"{after_conv[1]}.norm.{after_conv[2]}" if after_conv else name


# the classifier, and tables of indices and masks that follow from the size of images
_UNUSED = r"cls_|.*\.(relative_position_index|attn_mask)$"


@BACKBONES.register("dat")
def create_dat(options: BackboneOptions) -> Backbone:
    """Build a DAT."""
    name = f"dat_{options.variant}"
    if options.variant not in SIZES:
        hint = nearest_hint(name, [f"dat_{size}" for size in SIZES])
        raise ConfigError(f"backbone {name}: there is no such size. {hint}")
    options.refuse_for(name)
    network = DAT(SIZES[options.variant], options)
    load_published(network, options, name, published=published_name, unused=_UNUSED)
    early = [network.patch_proj, network.stages[0]]
    for module in [network] if options.frozen_stages > 2 else early[: options.frozen_stages]:
        module.requires_grad_(False)
    return network
