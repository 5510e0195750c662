"""Deformable convolutions in a ResNet (arXiv 1703.06211; with modulation, arXiv 1811.11168)."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

Version = Literal["v1", "v2"]
OFFSETS = ".conv2.conv_offset."  # in the names of what computes the offsets


class DeformableConv2d(nn.Conv2d):
    """A convolution whose kernel reads where the map tells it to, between cells too.

    v1: y(p) = sum over k of w_k * x(p + p_k + offset_k). v2: each term times m_k = sigmoid(...),
    0..1. Offsets and m are computed by a convolution of the same kernel over the same map, which
    starts at zero: v1 then is the plain convolution, v2 half of it. Beyond the map x is zero.

    Offsets are in cells (y, x) of the map that is read, without bound. Autocast leaves all of it in
    the precision of the weights: offsets are places, and torchvision's op has no bfloat16.

    The weights have the names of the plain convolution, so its checkpoints fit; `conv_offset` is
    added to them.
    """

    def __init__(self, plain: nn.Conv2d, version: Version) -> None:
        """Take the place of a plain convolution, with its weights."""
        place: dict[str, Any] = {
            "kernel_size": plain.kernel_size,
            "stride": plain.stride,
            "padding": plain.padding,
            "dilation": plain.dilation,
        }
        channels = plain.in_channels
        super().__init__(
            channels, plain.out_channels, groups=plain.groups, bias=plain.bias is not None, **place
        )
        self.weight, self.bias = plain.weight, plain.bias
        self.points = plain.kernel_size[0] * plain.kernel_size[1]
        numbers = 2 if version == "v1" else 3
        self.conv_offset = nn.Conv2d(channels, numbers * self.points, **place)
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with these weights, which a norm may be part of. Shape: as `nn.Conv2d`."""
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(weight.dtype)
            computed = self.conv_offset(x)  # [N,18 or 27,H',W']: (y, x) of each point, then m
            offset, modulation = computed[:, : 2 * self.points], computed[:, 2 * self.points :]
            m = modulation.sigmoid() if modulation.shape[1] else None
            place: dict[str, Any] = {
                "stride": self.stride,
                "padding": self.padding,
                "dilation": self.dilation,
            }
            output: Tensor = deform_conv2d(x, offset, weight, bias, mask=m, **place)
            return output


def make_deformable(stage: nn.Module, version: Version) -> None:
    """Replace the second convolution, a 3x3 one, of each residual block of a stage."""
    for block in stage.children():
        block.conv2 = DeformableConv2d(cast(nn.Conv2d, block.conv2), version)
