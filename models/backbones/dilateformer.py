"""DilateFormer: dilated neighbourhoods in its first two stages, all cells in its last two.

Jiao et al., DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition, arXiv 2302.01791.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.backbones import BACKBONES, Backbone, BackboneOptions
from models.backbones.published import drop_path_rates, load_published
from models.backbones.resnet import conv_norm
from models.encoders.msda import DILATIONS, dilated_attention
from models.layers import ExactLayerNorm, checkpointed, without_padding
from util.errors import ConfigError, nearest_hint

Norm = Callable[[int], nn.Module]
_EPS = 1e-6  # of layer norms
_STEM = 16  # channels of its first convolution


@dataclass(frozen=True)
class Size:
    """Width of the first stage, which doubles from stage to stage, and blocks of each."""

    width: int
    depths: tuple[int, int, int, int]


SIZES = {
    "tiny": Size(72, (2, 2, 6, 2)),
    "small": Size(72, (3, 5, 8, 3)),
    "base": Size(96, (4, 8, 10, 3)),
}
_HEADS = (3, 6, 12, 24)


def halved(padding: Tensor | None) -> Tensor | None:
    """Return the padding after a convolution of stride 2, whose windows lie around even cells."""
    return None if padding is None else padding[:, ::2, ::2]


class Stem(nn.Module):
    """Four convolutions, two of them of stride 2, with norms between them."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        widths, layers = (3, _STEM, 2 * _STEM, 4 * _STEM, channels), list[nn.Module]()
        for i in range(4):
            stride = 1 + i % 2
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False)
            layers += [conv] if i == 3 else [conv, norm(widths[i + 1]), nn.GELU()]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Shape: x [N,3,H,W]; padding [N,H,W] -> [N,C,H/4,W/4]."""
        for first in range(0, 9, 3):
            conv, norm, act = self.proj[first : first + 3]
            assert isinstance(conv, nn.Conv2d)
            x = act(conv_norm(without_padding(x, padding), conv, norm))
            padding = halved(padding) if conv.stride[0] == 2 else padding
        y: Tensor = self.proj[9](without_padding(x, padding))
        return y


class DilatedAttention(nn.Module):
    """Heads in three parts, which look at neighbours 1, 2 and 3 cells apart (Eq. 4 and 5)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Attend; padding counts as what lies beyond the border.

        Shape: x [N,C,H,W]; padding [N,H,W], True = padding -> [N,C,H,W].
        """
        q, k, v = self.qkv(x).permute(0, 2, 3, 1).chunk(3, dim=-1)
        if padding is not None:
            k, v = (t.masked_fill(padding[..., None], 0) for t in (k, v))
        shares = zip(*(t.chunk(len(DILATIONS), dim=-1) for t in (q, k, v)), DILATIONS, strict=True)
        found = [
            dilated_attention(*share, dilation=dilation, heads=self.heads // len(DILATIONS))
            for *share, dilation in shares
        ]
        y: Tensor = self.proj(torch.cat(found, dim=-1))
        return y.permute(0, 3, 1, 2)


class GlobalAttention(nn.Module):
    """Attention of every cell to all; padding is a key for nobody."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Shape: x [N,C,H,W]; padding [N,H,W], True = padding -> [N,C,H,W]."""
        qkv: Tensor = self.qkv(x.flatten(2).mT)
        heads = qkv.view(len(x), qkv.shape[1], 3, self.heads, -1)
        q, k, v = (t.transpose(1, 2) for t in heads.unbind(2))
        seen = None if padding is None else ~padding.flatten(1)[:, None, None]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        y: Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return y.mT.reshape(x.shape)


class Block(nn.Module):
    """A depth-wise convolution that encodes position, attention, and a feed-forward block."""

    def __init__(self, channels: int, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1, self.attn = ExactLayerNorm(channels, eps=_EPS), attention
        self.norm2 = ExactLayerNorm(channels, eps=_EPS)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(channels, 4 * channels))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * channels, channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Shape: x [N,C,H,W]; padding [N,H,W] -> [N,C,H,W]."""
        x = x + self.pos_embed(without_padding(x, padding))
        normed = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.attn(normed, padding))
        tokens: Tensor = x.permute(0, 2, 3, 1)
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks, and what halves the map after them, which the last stage lacks."""

    def __init__(
        self, channels: int, heads: int, rates: list[float], norm: Norm | None, *, dilated: bool
    ) -> None:
        super().__init__()
        kind = DilatedAttention if dilated else GlobalAttention
        self.blocks = nn.ModuleList(Block(channels, kind(channels, heads), rate) for rate in rates)
        self.downsample = nn.ModuleDict()
        if norm is not None:
            conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
            self.downsample["proj"] = nn.Sequential(conv, norm(2 * channels))


class DilateFormer(nn.Module):
    """Maps of strides 8, 16 and 32, or the last alone, each after a norm of its own."""

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    checkpointing = False
    reads_padding = True

    def __init__(self, size: Size, options: BackboneOptions) -> None:
        super().__init__()
        norm: Norm = nn.BatchNorm2d if options.train_norm else FrozenBatchNorm2d
        widths = [size.width * 2**i for i in range(4)]
        self.patch_embed = Stem(widths[0], norm)
        rates = drop_path_rates(options, size.depths)
        self.stages = nn.ModuleList(
            Stage(widths[i], _HEADS[i], rates[i], norm if i < 3 else None, dilated=i < 2)
            for i in range(4)
        )
        self._first = 3 if options.single_level else 1
        self.channels = tuple(widths[self._first :])
        self.strides = (4, 8, 16, 32)[self._first :]
        self.norms = nn.ModuleDict(
            {str(i): ExactLayerNorm(widths[i], eps=_EPS) for i in range(self._first, 4)}
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """Return maps, finest first; padding is no part of any image.

        Shape: images [N,3,H,W]; padding [N,H,W], True = padding -> maps [N,C,H/stride,W/stride].
        """
        x = checkpointed(self.patch_embed, images, padding, enabled=self.checkpointing)
        padding = halved(halved(padding))
        maps = []
        for i, module in enumerate(self.stages):
            stage = cast(Stage, module)
            for block in stage.blocks:
                x = checkpointed(block, x, padding, enabled=self.checkpointing)
            if i >= self._first:
                maps.append(self.norms[str(i)](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            if i < 3:
                x = stage.downsample["proj"](without_padding(x, padding))
                padding = halved(padding)
        return maps


@BACKBONES.register("dilateformer")
def create_dilateformer(options: BackboneOptions) -> Backbone:
    """Build a DilateFormer."""
    name = f"dilateformer_{options.variant}"
    if options.variant not in SIZES:
        hint = nearest_hint(name, [f"dilateformer_{size}" for size in SIZES])
        raise ConfigError(f"backbone {name}: there is no such size. {hint}")
    options.refuse_for(name)
    network = DilateFormer(SIZES[options.variant], options)
    load_published(network, options, name, published=str, unused=r"head\.|norm\.")
    early = [network.patch_embed, cast(Stage, network.stages[0]).blocks]
    for module in [network] if options.frozen_stages > 2 else early[: options.frozen_stages]:
        module.requires_grad_(False)
    return network
