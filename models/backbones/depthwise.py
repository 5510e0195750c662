"""Depthwise convolutions that a CPU computes in float32 under autocast, too."""

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """A convolution that autocast leaves in the precision of its weights on a CPU.

    In a depthwise one bfloat16 speeds up no matrix product, and oneDNN's backward pass of it takes
    twice as long as in float32 (docs/performance.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N,C,H,W] -> [N,C,H',W']."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


class DepthwiseConv2dSame(DepthwiseConv2d, Conv2dSame):
    """The same, with TensorFlow's padding."""


_KINDS = {nn.Conv2d: DepthwiseConv2d, Conv2dSame: DepthwiseConv2dSame}


def exempt_depthwise(body: nn.Module) -> None:
    """Make the depthwise convolutions of a network the kind above; weights and names stay."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.__class__ = _KINDS.get(type(module), type(module))
