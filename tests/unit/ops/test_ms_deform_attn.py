"""The deformable attention op, every CPU backend, against a loop written from Eq. 3."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import fused_ms_deform_attn, ms_deform_attn, use_backend
from ops.backends import BACKENDS
from tests.unit.ops.oracle import Shapes, fused_oracle, loop_oracle, make_inputs, read_bilinear

CPU_BACKENDS = ("cpu", "reference")


@pytest.fixture(params=CPU_BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test once with every backend that computes on the CPU."""
    assert BACKENDS[request.param].unavailable(torch.device("cpu")) is None
    with use_backend(request.param):
        yield


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


def test_without_queries_the_gradient_of_a_strided_value_is_contiguous_as_declared() -> None:
    value, shapes, locations, weights = make_inputs(n=2, q=0, m=2, d=4, k=2)
    strided = value.transpose(1, 2).contiguous().transpose(1, 2)
    sides = [side for shape in shapes for side in shape]
    found = torch.ops.msdeform.ms_deform_attn_backward(
        value.new_zeros(2, 0, 8), strided, sides, locations, weights, None, False
    )
    assert not strided.is_contiguous()
    assert all(t.is_contiguous() for t in found)


def test_calls_by_turns_that_differ_in_little() -> None:
    calls = [
        make_inputs(n, q, m, d, k, shapes, dtype)
        for n, q, m, d, k, shapes, dtype in [
            (2, 3, 2, 4, 2, [(2, 6), (1, 2)], torch.float64),
            (2, 3, 2, 4, 2, [(6, 2), (1, 2)], torch.float64),  # as many tokens
            (2, 3, 4, 2, 2, [(6, 2), (1, 2)], torch.float64),  # as wide
            (2, 3, 2, 4, 2, [(6, 2), (1, 2)], torch.float32),
            (2, 5, 2, 4, 2, [(6, 2), (1, 2)], torch.float64),
            (2, 3, 2, 4, 3, [(6, 2), (1, 2)], torch.float64),
        ]
    ]
    for _ in range(2):
        for inputs in calls:
            torch.testing.assert_close(ms_deform_attn(*inputs), loop_oracle(*inputs))


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


def fused_inputs(
    numbers: int, *, n: int = 2, q: int = 5, m: int = 2, d: int = 4, k: int = 3
) -> tuple[Tensor, Shapes, Tensor, Tensor, Tensor]:
    """Return inputs of the fused form, some of whose points lie outside."""
    value, shapes, offsets, logits = make_inputs(n, q, m, d, k)
    reference = torch.rand(n, q, len(shapes), numbers, dtype=torch.float64) * 1.2 - 0.1
    return value, shapes, reference, offsets * 4 - 2, logits * 4 - 2


@pytest.mark.parametrize("numbers", [2, 4])
def test_fused_form_equals_a_loop_and_its_gradients(numbers: int) -> None:
    value, shapes, *rest = fused_inputs(numbers)
    leaves = [t.requires_grad_() for t in (value, *rest)]
    output = fused_ms_deform_attn(leaves[0], shapes, *leaves[1:])
    expected = fused_oracle(leaves[0], shapes, *leaves[1:])
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(output)
    plain = ms_deform_attn(leaves[0], shapes, *_unfused(shapes, *leaves[1:]))
    torch.testing.assert_close(output, plain)
    actual = torch.autograd.grad((output * weight).sum(), leaves)
    wanted = torch.autograd.grad((plain * weight).sum(), leaves)
    torch.testing.assert_close(actual, wanted)


def _unfused(
    shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    around = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype)
        locations = around + offsets / sizes[:, None]
    else:
        locations = around[..., :2] + offsets * around[..., 2:] * (0.5 / offsets.shape[4])
    return locations, logits.flatten(3).softmax(-1).view_as(logits)


@pytest.mark.parametrize("numbers", [2, 4])
def test_fused_gradients_equal_finite_differences(numbers: int) -> None:
    shapes = [(3, 4), (2, 2)]
    value = torch.randn(1, 16, 2, 3, dtype=torch.float64)
    reference = torch.full((1, 2, 2, numbers), 0.5, dtype=torch.float64)
    offsets = torch.rand(1, 2, 2, 2, 2, 2, dtype=torch.float64) * 0.3 + 0.1
    logits = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64)

    def attend(*leaves: Tensor) -> Tensor:
        return fused_ms_deform_attn(leaves[0], shapes, *leaves[1:])

    leaves = [t.requires_grad_() for t in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(attend, leaves)


def test_softmax_of_large_logits_stays_finite() -> None:
    value, shapes, reference, offsets, logits = fused_inputs(2)
    logits = logits * 1000
    output = fused_ms_deform_attn(value, shapes, reference, offsets, logits)
    torch.testing.assert_close(output, fused_oracle(value, shapes, reference, offsets, logits))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    q=st.integers(1, 7),
    m=st.integers(1, 3),
    d=st.sampled_from([1, 3, 4, 8, 16, 17, 32, 48, 64, 80]),
    k=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    many=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_equals_a_loop_in_both_directions(
    n: int, q: int, m: int, d: int, k: int, shapes: Shapes, many: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q = q * 12 if many else q  # few queries and many go different ways through the value
    value, _, locations, weights = make_inputs(n, q, m, d, k, shapes)
    with use_backend("reference"):
        expected, expected_grads = _with_gradients(value, shapes, locations, weights)
    actual, grads = _with_gradients(value, shapes, locations, weights)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grads, expected_grads)
    single, single_grads = _with_gradients(
        value.float(), shapes, locations.float(), weights.float()
    )
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single_grads[0].double(), expected_grads[0], rtol=1e-4, atol=1e-4)


def _with_gradients(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
    output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    weight = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return output.detach(), torch.autograd.grad((output * weight).sum(), leaves)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_points_that_are_no_numbers_read_zero(bad: float) -> None:
    value, shapes, locations, weights = make_inputs(n=1, q=40, m=2, d=16, k=2)
    locations[0, ::3] = bad
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    assert not output[0, ::3].any()
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[1][0, ::3].any()
    assert not gradients[2][0, ::3].any()


@pytest.mark.parametrize("few", [True, False])
def test_values_that_no_corner_touches_do_not_matter(few: bool) -> None:
    value, shapes, locations, weights = make_inputs(n=1, q=2 if few else 60, m=1, d=16, k=2)
    locations = locations * 0.2 + 2  # all outside
    output = ms_deform_attn(torch.full_like(value, torch.nan), shapes, locations, weights)
    assert not output.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q", [4, 90])
def test_half_precision_rounds_values_and_results_only(dtype: torch.dtype, q: int) -> None:
    value, shapes, locations, weights = make_inputs(n=2, q=q, m=2, d=32, k=2)
    value = value.to(dtype)
    exact, exact_grads = _with_gradients(value.double(), shapes, locations, weights)
    low, grads = _with_gradients(value, shapes, locations.float(), weights.float())
    assert low.dtype == grads[0].dtype == dtype
    assert grads[1].dtype == grads[2].dtype == torch.float32
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(low.double(), exact, rtol=step, atol=1e-4)
    # the output's gradient is rounded once before it is spread
    torch.testing.assert_close(grads[0].double(), exact_grads[0], rtol=4 * step, atol=8 * step)
    torch.testing.assert_close(grads[2].double(), exact_grads[2], rtol=4 * step, atol=16 * step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_numbers_pass_unchanged(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    value = every.view(1, 1, -1, 16)
    locations = torch.full((1, 1, value.shape[2], 1, 1, 2), 0.5)
    weights = torch.ones(1, 1, value.shape[2], 1, 1)
    output = ms_deform_attn(value, [(1, 1)], locations, weights).view(-1)
    torch.testing.assert_close(output, every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.long
@pytest.mark.parametrize("fused", [False, True])
def test_operators_are_what_they_say(fused: bool) -> None:
    reference = None
    if fused:
        value, shapes, reference, points, weights = fused_inputs(4, n=1, q=3)
        reference.requires_grad_()
    else:
        value, shapes, points, weights = make_inputs(n=1, q=3, m=2, d=4, k=2)
    flat = [side for shape in shapes for side in shape]
    leaves = [t.requires_grad_() for t in (value, points, weights)]
    inputs = (leaves[0], flat, leaves[1], leaves[2], reference)
    torch.library.opcheck(torch.ops.msdeform.ms_deform_attn, inputs)


def test_autocast_keeps_locations_exact() -> None:
    value, shapes, locations, weights = make_inputs(n=1, q=5, m=2, d=16, k=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = ms_deform_attn(value, shapes, locations, weights)
    assert low.dtype == torch.bfloat16
    expected = ms_deform_attn(value.bfloat16(), shapes, locations, weights)
    assert torch.equal(low, expected)


def test_compiles_without_a_break_and_exports() -> None:
    value, shapes, *rest = fused_inputs(2)

    class Attend(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return fused_ms_deform_attn(tensors[0] * 2, shapes, *tensors[1:]).sin()

    leaves = [t.requires_grad_() for t in (value, *rest)]
    expected = Attend()(*leaves)
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )
    exported = torch.export.export(Attend(), tuple(leaves)).module()
    torch.testing.assert_close(exported(*leaves), expected)


def test_cell_centres_and_edges_are_exact() -> None:
    shapes = [(4, 8), (2, 1)]  # powers of two: locations on centres and edges are exact numbers
    value, _, locations, weights = make_inputs(n=2, q=64, m=2, d=5, k=2, shapes=shapes)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    locations = (locations * sizes * 2).round() / 2 / sizes
    output, grads = _with_gradients(value, shapes, locations, weights)
    torch.testing.assert_close(output, loop_oracle(value, shapes, locations, weights))
    with use_backend("reference"):
        expected = _with_gradients(value, shapes, locations, weights)[1]
    torch.testing.assert_close(grads[::2], expected[::2])
    # a point just a cell outside weighs nothing, and officially has no gradient
    near = (locations * sizes - 0.5 > -1).all(-1)
    torch.testing.assert_close(grads[1][near], expected[1][near])


def test_works_under_activation_checkpointing() -> None:
    value, shapes, *rest = fused_inputs(2)
    leaves = [t.requires_grad_() for t in (value, *rest)]

    def attend(*tensors: Tensor) -> Tensor:
        return fused_ms_deform_attn(tensors[0].tanh(), shapes, *tensors[1:])

    expected = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    output = checkpoint(attend, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), leaves), expected)


def test_second_derivatives_are_refused_in_words() -> None:
    value, shapes, locations, weights = make_inputs(n=1, q=2, m=1, d=2, k=1)
    value.requires_grad_()
    output = ms_deform_attn(value, shapes, locations.requires_grad_(), weights)
    (gradient,) = torch.autograd.grad(output.square().sum(), locations, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(gradient.sum(), value)


@pytest.mark.parametrize("q", [30, 300])
def test_number_of_threads_changes_no_bit(q: int) -> None:
    inputs = make_inputs(n=2, q=q, m=3, d=32, k=4, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpu"):
                output, grads = _with_gradients(*inputs)
            results.append((output, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_negative_side_is_refused() -> None:
    """Two of them make up for each other in the number of tokens."""
    value, at = torch.ones(1, 6, 1, 4), torch.full((1, 2, 1, 1, 1, 2), 0.5)
    with pytest.raises(ValueError, match=r"spatial_shapes \[\(-2, -3\)\] has a negative side"):
        ms_deform_attn(value, [(-2, -3)], at, torch.ones(1, 2, 1, 1, 1))
