"""The deformable attention op as a loop written from Eq. 3, and inputs to hold backends to it."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, int]]
SHAPES = [(5, 7), (3, 4), (1, 2)]


def make_inputs(
    n: int,
    q: int,
    m: int,
    d: int,
    k: int,
    shapes: Shapes = SHAPES,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Shapes, Tensor, Tensor]:
    """Return random inputs; locations reach half a level beyond each edge."""
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(n, tokens, m, d, dtype=dtype)
    locations = torch.rand(n, q, m, len(shapes), k, 2, dtype=dtype) * 2 - 0.5
    weights = torch.rand(n, q, m, len(shapes), k, dtype=dtype)
    return value, shapes, locations, weights


def read_bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """Interpolate a map [H,W,D] at cell coordinates, cell (0, 0) centred at 0.5, zero outside."""
    height, width = level.shape[:2]
    column, row = math.floor(x - 0.5), math.floor(y - 0.5)
    total = torch.zeros(level.shape[2], dtype=level.dtype)
    for r, c in itertools.product((row, row + 1), (column, column + 1)):
        if 0 <= r < height and 0 <= c < width:
            total += (1 - abs(x - 0.5 - c)) * (1 - abs(y - 0.5 - r)) * level[r, c]
    return total


def loop_oracle(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum weighted samples one by one."""
    n, _, m, d = value.shape
    q, k = locations.shape[1], locations.shape[4]
    output = torch.zeros(n, q, m, d, dtype=value.dtype)
    for b, i, head in itertools.product(range(n), range(q), range(m)):
        start = 0
        for level, (height, width) in enumerate(shapes):
            cells = value[b, start : start + height * width, head].reshape(height, width, d)
            start += height * width
            for point in range(k):
                x, y = locations[b, i, head, level, point].tolist()
                sample = read_bilinear(cells, x * width, y * height)
                output[b, i, head] += weights[b, i, head, level, point] * sample
    return output.flatten(2)


def fused_oracle(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Attend with softmax weights at reference points plus offsets (Appendix A.4)."""
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    around = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype)
        locations = around + offsets / sizes[:, None]
    else:
        sides = reference[:, :, None, :, None, 2:]
        locations = around + offsets / offsets.shape[4] * sides / 2
    return loop_oracle(value, shapes, locations, weights)
