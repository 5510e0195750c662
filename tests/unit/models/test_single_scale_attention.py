"""Deformable attention on one map, beside Eq. 2 written out."""

import itertools
import math

import torch
from torch import Tensor

from models.single_scale_attention import DeformAttn
from tests.unit.models.small import perturb


def bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    """Return the value between cells, zero outside. Shape: plane [C,H,W] -> [C]."""
    total = plane.new_zeros(len(plane))
    for row, column in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= row < plane.shape[1] and 0 <= column < plane.shape[2]:
            share = (1 - abs(y - row)) * (1 - abs(x - column))
            total = total + plane[:, row, column] * share
    return total


@torch.no_grad()
def test_it_is_the_sum_of_the_paper() -> None:
    torch.manual_seed(0)
    width, heads, points, height, columns = 6, 2, 3, 4, 5
    module = DeformAttn(width, heads, points).double()
    perturb(module)
    query = torch.randn(2, 3, width, dtype=torch.float64)
    reference = torch.rand(2, 3, 2, dtype=torch.float64)
    x = torch.randn(2, width, height, columns, dtype=torch.float64)
    padding = torch.zeros(2, height, columns, dtype=torch.bool)
    padding[1, :, 3:] = True
    found = module(query, reference, x, padding)
    d = width // heads
    for n, q in itertools.product(range(2), range(3)):
        expected = module.output_proj.bias.clone()
        z = query[n, q]
        offsets = (module.sampling_offsets.weight @ z + module.sampling_offsets.bias).view(
            heads, points, 2
        )
        logits = module.attention_weights.weight @ z + module.attention_weights.bias
        shares = logits.view(heads, points).softmax(-1)
        # W'_m x: a cell of padding is zero
        value = torch.einsum("oc,chw->ohw", module.value_proj.weight, x[n])
        value = (value + module.value_proj.bias[:, None, None]) * ~padding[n]
        for m, k in itertools.product(range(heads), range(points)):
            own = slice(m * d, (m + 1) * d)
            column = float(reference[n, q, 0] * columns - 0.5 + offsets[m, k, 0])
            row = float(reference[n, q, 1] * height - 0.5 + offsets[m, k, 1])
            sample = bilinear(value[own], row, column)
            expected += module.output_proj.weight[:, own] @ (shares[m, k] * sample)
        torch.testing.assert_close(found[n, q], expected)
