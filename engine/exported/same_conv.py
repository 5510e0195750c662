"""Convolutions with TensorFlow's padding as one operator of a graph.

How much these pad depends on the size of the map: half of the excess before it, the rest after it.
With sizes left open, that would enter the shape of all that follows, one convolution after the
other, until shapes can no longer be compared. As an operator, all that is known is that sides are
divided by the stride and rounded up. ONNX has the same convolution.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from torch import Tensor, nn

from engine.exported.packages import needed


@torch.library.custom_op(
    "deformable_detr::conv_same",
    mutates_args=(),
    # torch 2.6 cannot read it off the annotations below
    schema="(Tensor x, Tensor weight, Tensor bias, int[] stride, int[] dilation, int groups)"
    " -> Tensor",
)
def conv_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve a padded map. Shape: x [N,C,H,W] -> [N,C',H/stride,W/stride], rounded up."""
    along_y, along_x = stride
    dilated_y, dilated_x = dilation
    found: Tensor = conv2d_same(
        x, weight, bias, (along_y, along_x), dilation=(dilated_y, dilated_x), groups=groups
    )
    return found.contiguous()  # as the graph takes it to be


@conv_same.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    sides = [(side + step - 1) // step for side, step in zip(x.shape[2:], stride, strict=True)]
    return x.new_empty(x.shape[0], weight.shape[0], *sides)


@contextmanager
def as_operators(model: nn.Module) -> Iterator[None]:
    """Let these convolutions of a model call the operator."""
    convolutions = [module for module in model.modules() if isinstance(module, Conv2dSame)]
    for module in convolutions:
        vars(module)["forward"] = partial(_call, module)
    try:
        yield
    finally:
        for module in convolutions:
            del vars(module)["forward"]


def _call(module: Any, x: Tensor) -> Tensor:
    bias = module.bias
    if bias is None:
        bias = x.new_zeros(module.weight.shape[0])
    found: Tensor = conv_same(x, module.weight, bias, module.stride, module.dilation, module.groups)
    return found


def in_onnx() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how ONNX says it, by operator."""
    standard = needed("onnxscript").opset18

    # tensors have no annotation: those that have one become attributes
    def convolution(  # type: ignore[no-untyped-def]
        x, weight, bias, stride: Sequence[int], dilation: Sequence[int], groups: int
    ):
        return standard.Conv(
            x, weight, bias, auto_pad="SAME_UPPER", strides=stride, dilations=dilation, group=groups
        )

    return {torch.ops.deformable_detr.conv_same.default: convolution}
