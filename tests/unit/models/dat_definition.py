"""DAT's attention written out in loops, point by point."""

import itertools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dat_attention import DATAttention


def bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    """Return the value between cells, zero outside. Shape: plane [...,H,W] -> [...]."""
    total = plane.new_zeros(plane.shape[:-2])
    for row, column in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= row < plane.shape[-2] and 0 <= column < plane.shape[-1]:
            share = (1 - abs(y - row)) * (1 - abs(x - column))
            total = total + plane[..., row, column] * share
    return total


def per_cell(x: Tensor, layer: nn.Module) -> Tensor:
    """Apply a linear layer or a 1x1 convolution to the channels. Shape: x [C,...] -> [C',...]."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    product = torch.einsum("oc,c...->o...", weight.flatten(1), x)
    return product + bias.view(-1, *[1] * (x.dim() - 1))


def over_channels(x: Tensor, norm: Any) -> Tensor:
    """Apply a layer norm to the channels. Shape: [C,H,W] -> the same."""
    mean, var = x.mean(0), x.var(0, correction=0)
    weight: Tensor = norm.weight[:, None, None]
    bias: Tensor = norm.bias[:, None, None]
    eps: float = norm.eps
    return (x - mean) / (var + eps).sqrt() * weight + bias


def dat_attention_by_definition(
    module: DATAttention, x: Tensor, pos: Tensor | None = None
) -> Tensor:
    """DAT's attention of one image, query by query; positions are of queries and keys.

    Shape: x, pos [C,H,W] -> [C,H,W].
    """
    placed = x if pos is None else x + pos
    channels, height, width = x.shape
    heads, groups, stride = module.heads, module.groups, module.stride
    d, of_group, side = channels // heads, channels // groups, module.rpe_table.shape[-1]
    corrected = module.grid == "corrected"
    q = per_cell(placed, module.proj_q)
    out = torch.zeros_like(x)
    points_of, keys_of, values_of = [], [], []
    for g in range(groups):
        own = slice(g * of_group, (g + 1) * of_group)
        parts: Any = module.conv_offset
        depthwise, norm, _, last = parts
        kernel = depthwise.weight.shape[-1]
        seen = F.conv2d(q[None, own], depthwise.weight, depthwise.bias, stride, kernel // 2,
                        groups=of_group)[0]  # fmt: skip
        hidden = F.gelu(over_channels(seen, norm))
        raw = torch.einsum("oc,chw->ohw", last.weight[:, :, 0, 0], hidden).tanh()
        rows, columns = raw.shape[1:]
        # where points are, as parts of the way from the first cell to the last
        points = []
        for i, j in itertools.product(range(rows), range(columns)):
            dy, dx = (float(raw[axis, i, j]) * module.offset_range / 2 for axis in (0, 1))
            if corrected:
                y, x_ = (i + dy) * stride / (height - 1), (j + dx) * stride / (width - 1)
            else:
                y, x_ = (i + 0.5 + dy) / rows, (j + 0.5 + dx) / columns
            points.append((y, x_))
        places = [(y * (height - 1), x_ * (width - 1)) for y, x_ in points]
        keys_of.append(torch.stack([bilinear(placed[own], *place) for place in places], -1))
        values_of.append(torch.stack([bilinear(x[own], *place) for place in places], -1))
        points_of.append(points)
    k = per_cell(torch.cat(keys_of), module.proj_k)  # [C,P]
    v = per_cell(torch.cat(values_of), module.proj_v)
    for m in range(heads):
        own, points = slice(m * d, (m + 1) * d), points_of[m * groups // heads]
        for i, j in itertools.product(range(height), range(width)):
            at = (i / (height - 1), j / (width - 1))
            if not corrected:
                at = ((i + 0.5) / height, (j + 0.5) / width)
            logits = []
            for p, (y, x_) in enumerate(points):
                row = (at[0] - y + 1) / 2 * (side - 1)
                column = (at[1] - x_ + 1) / 2 * (side - 1)
                bias = bilinear(module.rpe_table[m], row, column)
                logits.append(q[own, i, j] @ k[own, p] / d**0.5 + bias)
            out[own, i, j] = v[own] @ torch.stack(logits).softmax(0)
    return per_cell(out, module.proj_out)
