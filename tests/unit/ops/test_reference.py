"""The deformable attention op against a loop written from Eq. 3 and against recorded values."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import ms_deform_attn

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


def test_equals_a_loop_over_samples() -> None:
    inputs = make_inputs(n=2, q=6, m=3, d=4, k=2)
    torch.testing.assert_close(ms_deform_attn(*inputs), loop_oracle(*inputs))


@given(
    x=st.floats(-0.5, 1.5),
    y=st.floats(-0.5, 1.5),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_one_sample_equals_bilinear_interpolation(
    x: float, y: float, height: int, width: int
) -> None:
    cells = torch.arange(height * width, dtype=torch.float64).reshape(height, width, 1) + 1
    sampled = ms_deform_attn(
        cells.reshape(1, -1, 1, 1),
        [(height, width)],
        torch.tensor([x, y], dtype=torch.float64).reshape(1, 1, 1, 1, 1, 2),
        torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
    )
    expected = read_bilinear(cells, x * width, y * height)
    torch.testing.assert_close(sampled[0, 0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", range(4))
def test_recorded_outputs_and_gradients(case: int, shared: Callable[[str], Path]) -> None:
    archive = np.load(shared("reference/op.npz"))
    data = {k.split(".")[1]: torch.from_numpy(archive[k]) for k in archive if k[0] == str(case)}
    value, loc, weight = (data[k].requires_grad_() for k in ("value", "loc", "weight"))
    shapes = [(int(h), int(w)) for h, w in data["shapes"].tolist()]
    output = ms_deform_attn(value, shapes, loc, weight)
    torch.testing.assert_close(output, data["out"], rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(output, (value, loc, weight), data["grad_out"])
    for name, gradient in zip(("value", "loc", "weight"), gradients, strict=True):
        torch.testing.assert_close(gradient, data[f"grad_{name}"], rtol=1e-9, atol=1e-10)


def test_gradients_equal_finite_differences() -> None:
    value, shapes, _, weights = make_inputs(n=1, q=2, m=2, d=3, k=2, shapes=[(3, 4), (2, 2)])
    # away from cell centres, where the gradient by the location jumps
    cells = torch.rand(1, 2, 2, 2, 2, 2, dtype=torch.float64) * 0.6 + 0.7
    sizes = torch.tensor([[4.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    locations = cells / sizes[:, None]

    def attend(v: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return ms_deform_attn(v, shapes, x, w)

    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    assert torch.autograd.gradcheck(attend, leaves)


def test_strided_inputs_give_the_same() -> None:
    value, shapes, locations, weights = make_inputs(n=2, q=5, m=2, d=3, k=2)
    expected = ms_deform_attn(value, shapes, locations, weights)
    strided = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        shapes,
        locations.flip(-1).contiguous().flip(-1).transpose(0, 3).contiguous().transpose(0, 3),
        weights.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
    )
    assert not any(t.is_contiguous() for t in strided if isinstance(t, Tensor))
    torch.testing.assert_close(ms_deform_attn(*strided), expected, rtol=0, atol=0)


def test_bfloat16_follows_float32() -> None:
    value, shapes, locations, weights = make_inputs(n=1, q=9, m=2, d=4, k=2)
    rounded = [t.to(torch.bfloat16) for t in (value, locations, weights)]
    low = ms_deform_attn(rounded[0], shapes, rounded[1], rounded[2])
    high = ms_deform_attn(rounded[0].float(), shapes, rounded[1].float(), rounded[2].float())
    assert low.dtype == torch.bfloat16
    # a location is known to 1/256 of the level, so a sample moves by some hundredths
    torch.testing.assert_close(low.float(), high, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [-1e4, 3.0, 1e9, -1e30])
def test_points_far_outside_read_zero(far: float, dtype: torch.dtype) -> None:
    value, shapes, locations, weights = make_inputs(n=1, q=3, m=2, d=4, k=2, dtype=dtype)
    leaves = [t.requires_grad_() for t in (value, torch.full_like(locations, far), weights)]
    output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    assert not output.any()
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert not gradient.any()


@pytest.mark.parametrize(("n", "q"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_attend_gives_an_empty_result(n: int, q: int) -> None:
    value, shapes, locations, weights = make_inputs(n=n, q=q, m=2, d=4, k=2)
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    assert output.shape == (n, q, 8)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]


def test_spatial_shapes_may_be_a_tensor() -> None:
    value, shapes, locations, weights = make_inputs(n=1, q=2, m=1, d=2, k=1)
    as_tensor = ms_deform_attn(value, torch.tensor(shapes), locations, weights)
    assert torch.equal(as_tensor, ms_deform_attn(value, shapes, locations, weights))


def test_shapes_that_do_not_fit_are_refused() -> None:
    value, shapes, locations, weights = make_inputs(n=2, q=3, m=2, d=4, k=2)
    wrong: list[tuple[Tensor, Shapes, Tensor, Tensor]] = [
        (value[:, :-1], shapes, locations, weights),
        (value[0], shapes, locations, weights),
        (value[:1], shapes, locations, weights),
        (value, shapes[:2], locations, weights),
        (value[:, :, :1], shapes, locations, weights),
        (value, shapes, locations[..., :1], weights),
        (value, shapes, locations[:, :2], weights),
        (value, shapes, locations, weights[..., :1]),
        (value, shapes, locations[..., 0], weights),
        (value, shapes, locations, weights[..., None]),
    ]
    for inputs in wrong:
        with pytest.raises(ValueError, match="ms_deform_attn: "):
            ms_deform_attn(*inputs)
