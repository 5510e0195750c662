"""The CUDA backend, emulated on the CPU and, where there is one, on a GPU.

Held to the reference backend in float64 and to a loop written from Eq. 3.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from ops.call import BackendError, Call, Gradients
from ops.compiler import compiler
from ops.cuda import CudaBackend, CudaLaunch, KernelKind, prepare
from ops.reference import ReferenceBackend
from tests.unit.ops.emulated import EmulatedBackend
from tests.unit.ops.oracle import SHAPES, Shapes, fused_oracle, loop_oracle, make_inputs
from tests.unit.ops.presets import Layer, layers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
QUERIES = 21  # no multiple of the groups of a block
TOLERANCE = {F64: 1e-9, F32: 1e-4, F16: 2e-3, BF16: 1.6e-2}

# dtype, channels, points, form. Chosen for how a row falls to the lanes of a group.
CASES = [
    (F64, 32, 2, 0), (F64, 6, 2, 2), (F64, 17, 3, 4),
    (F32, 1, 4, 0), (F32, 3, 1, 0), (F32, 17, 2, 0), (F32, 32, 4, 0), (F32, 48, 2, 0),
    (F32, 264, 1, 0),  # more bundles than lanes
    (F32, 32, 4, 2), (F32, 32, 4, 4), (F32, 4, 64, 4),  # shared memory for fewer groups
    (BF16, 32, 4, 0), (BF16, 40, 2, 2), (BF16, 3, 2, 4), (BF16, 16, 4, 2),
    (F16, 32, 4, 2), (F16, 17, 2, 4), (F16, 6, 2, 0),
]  # fmt: skip

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.version.cuda) and not os.environ.get("REQUIRE_GPU"),
    reason="needs an NVIDIA GPU",
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedBackend:
    """The backend on the CPU; a kernel is compiled once in a session."""
    try:
        compiler()
    except BackendError as error:
        pytest.skip(str(error))
    return EmulatedBackend(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def _no_undefined_behaviour(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "runtime error" not in capfd.readouterr().err


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    with deterministic():
        yield


def make_call(
    dtype: torch.dtype,
    channels: int,
    per_level: int,
    form: int,
    *,
    heads: int = 3,
    shapes: Shapes = SHAPES,
) -> Call:
    """Return a call with points inside, outside, far off and NaN."""
    value, _, points, weights = make_inputs(2, QUERIES, heads, channels, per_level, shapes)
    reference = None
    if form:
        weights, points = 3 * torch.randn_like(weights), 2 * torch.randn_like(points)
        reference = torch.rand(2, QUERIES, len(shapes), form, dtype=F64) * 1.4 - 0.2
    flat = points.view(-1, 2)
    flat[0], flat[1, 1], flat[2] = torch.nan, torch.nan, torch.tensor([1e30, 0.5])
    flat[3], flat[4] = torch.tensor([0.5, -torch.inf]), torch.tensor([torch.inf, torch.nan])
    sides = [side for shape in shapes for side in shape]
    return Call.of(value.to(dtype), sides, points, weights, reference)


def to(call: Call, dtype: torch.dtype, device: str = "cpu") -> Call:
    """Return `call` in another precision or place."""
    sides = [side for shape in call.shapes for side in shape]
    value, points, weights = (
        t.to(device) for t in (call.value.to(dtype), call.points, call.weights)
    )
    reference = None if call.reference is None else call.reference.to(device)
    return Call.of(value, sides, points, weights, reference)


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Compare, relative to the largest number expected."""
    if expected is None or actual is None:
        assert expected is actual
        return
    largest = float(expected[expected.isfinite()].abs().max())
    torch.testing.assert_close(
        actual.cpu().double(), expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True
    )


def assert_gradients_near(actual: Gradients, expected: Gradients, dtype: torch.dtype) -> None:
    """Compare gradients; only that of the value is rounded to the dtype of the value."""
    exact = TOLERANCE[F64 if dtype == F64 else F32]
    assert actual.value.dtype == dtype
    assert_near(actual.value, expected.value, TOLERANCE[dtype])
    for one, other in zip(astuple(actual)[1:], astuple(expected)[1:], strict=True):
        assert_near(one, other, exact)


def upstream(call: Call) -> Tensor:
    """Return a gradient of the output."""
    return torch.randn(call.output_shape).to(call.value.dtype).to(call.value.device)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "channels", "points", "form"), CASES)
def test_forward(
    emulated: EmulatedBackend, dtype: torch.dtype, channels: int, points: int, form: int
) -> None:
    call = make_call(dtype, channels, points, form)
    expected = ReferenceBackend().forward(to(call, F64))
    for backend in (emulated, emulated.reversed()):  # as if other lanes were ahead
        output = backend.forward(call)
        assert output.dtype == dtype
        assert_near(output, expected, TOLERANCE[dtype])


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "channels", "points", "form"), CASES)
def test_backward(
    emulated: EmulatedBackend, dtype: torch.dtype, channels: int, points: int, form: int
) -> None:
    call = make_call(dtype, channels, points, form)
    grad = upstream(call)
    expected = ReferenceBackend().backward(to(call, F64), grad.double(), need_reference=False)
    for backend in (emulated, emulated.reversed()):  # as if other lanes were ahead
        actual = backend.backward(call, grad, need_reference=False)
        assert_gradients_near(actual, expected, dtype)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "channels", "form"), [(F64, 6, 2), (F32, 32, 4), (BF16, 3, 4)])
def test_gradient_of_reference(
    emulated: EmulatedBackend, dtype: torch.dtype, channels: int, form: int
) -> None:
    call = make_call(dtype, channels, 2, form)
    grad = upstream(call)
    expected = ReferenceBackend().backward(to(call, F64), grad.double(), need_reference=True)
    actual = emulated.backward(call, grad, need_reference=True)
    assert_gradients_near(actual, expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("layer", layers(), ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_layer_of_the_presets(
    emulated: EmulatedBackend, dtype: torch.dtype, layer: Layer
) -> None:
    shapes = [(9, 7), (5, 4), (3, 2), (1, 2)][: layer.levels]
    call = make_call(
        dtype, layer.channels, layer.points, layer.form, heads=layer.heads, shapes=shapes
    )
    exact, grad = to(call, F64), upstream(call)
    assert_near(emulated.forward(call), ReferenceBackend().forward(exact), TOLERANCE[dtype])
    for need_reference in (False, True):
        expected = ReferenceBackend().backward(exact, grad.double(), need_reference=need_reference)
        with deterministic() if need_reference else nullcontext():  # once each is enough
            actual = emulated.backward(call, grad, need_reference=need_reference)
        assert_gradients_near(actual, expected, dtype)


@pytest.mark.long
def test_forward_equals_a_loop_over_samples(emulated: EmulatedBackend) -> None:
    value, shapes, locations, weights = make_inputs(n=2, q=6, m=3, d=6, k=2)
    sides = [side for shape in shapes for side in shape]
    plain = emulated.forward(Call.of(value, sides, locations, weights))
    torch.testing.assert_close(plain, loop_oracle(value, shapes, locations, weights))
    for form in (2, 4):
        reference = torch.rand(2, 6, len(shapes), form, dtype=F64)
        fused = emulated.forward(Call.of(value, sides, locations, weights, reference))
        expected = fused_oracle(value, shapes, reference, locations, weights)
        torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounds_like_pytorch(emulated: EmulatedBackend, dtype: torch.dtype) -> None:
    # two levels of one cell, of whose sum each has a share
    patterns = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16)
    first = patterns[: 1168 * 8].view(dtype).view(8, 1, 1168)
    value = torch.stack([first, first.flip(2) / 3], 1)
    points, weights = torch.full((8, 1, 1, 2, 1, 2), 0.5), torch.ones(8, 1, 1, 2, 1)
    weights[7] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)  # the NaN that GPUs make
    output = emulated.forward(Call.of(value, [1, 1, 1, 1], points, weights))
    expected = (value.float() * weights.view(8, 2, 1, 1)).sum(1).to(dtype)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def test_most_samples_that_shared_memory_holds(emulated: EmulatedBackend) -> None:
    value, shapes, locations, weights = make_inputs(
        1, 3, 1, 2, 307, shapes=[(3, 4), (1, 2)] * 2 + [(1, 1)]
    )
    call = Call.of(value, [3, 4, 1, 2] * 2 + [1, 1], locations, weights)
    assert KernelKind(F64, 1, 2, 5, 307).threads == 32
    assert_near(emulated.forward(call), ReferenceBackend().forward(call), 1e-9)
    with pytest.raises(BackendError, match="1536 samples .* 1535 samples and 2048 channels"):
        KernelKind(F64, 1, 2, 2, 768).program("sm_90")
    with pytest.raises(BackendError, match="4 samples of 2049 channels"):
        KernelKind(F32, 1, 2049, 2, 2).program("sm_90")


def test_more_tokens_than_an_index_holds() -> None:
    value = torch.empty(1, 2**27, 1, 1, device="meta")
    points, weights = value.new_empty(1, 1, 1, 1, 1, 2), value.new_empty(1, 1, 1, 1, 1)
    with pytest.raises(BackendError, match="134217728 tokens .* maximum, 134217727"):
        prepare(Call.of(value, [2**13, 2**14], points, weights))


def test_view_that_begins_off_a_boundary(emulated: EmulatedBackend) -> None:
    call = make_call(F32, 32, 4, 0)
    shifted = torch.cat([torch.zeros(1), call.value.flatten()])[1:].view(call.value.shape)
    assert shifted.data_ptr() % 16
    moved = Call(shifted, call.shapes, call.points, call.weights)
    assert emulated.forward(moved).equal(emulated.forward(call))


def crowded_call(dtype: torch.dtype, form: int) -> Call:
    """Return a call whose every sample falls into the few cells of one small level."""
    value, _, points, weights = make_inputs(1, 200, 1, 4, 2, shapes=[(2, 2)])
    reference = torch.rand(1, 200, 1, form) if form else None
    return Call.of(value.to(dtype), [2, 2], points, weights, reference)


def test_order_of_addition_matters_in_float32(emulated: EmulatedBackend) -> None:
    call = crowded_call(F32, 0)
    grad = upstream(call)
    orders = (emulated, emulated.reversed())
    one, other = (b.backward(call, grad, need_reference=False).value for b in orders)
    assert not one.equal(other)
    assert_near(one, other.double(), 1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(("dtype", "form"), [(F32, 0), (F32, 4), (F64, 0), (BF16, 2)])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_deterministic_in_any_order(
    emulated: EmulatedBackend, dtype: torch.dtype, form: int, size: float
) -> None:
    call = crowded_call(dtype, form)
    grad = upstream(call) * size
    orders = (emulated, emulated.reversed())
    one, other = (b.backward(call, grad, need_reference=False).value for b in orders)
    assert one.equal(other)
    expected = ReferenceBackend().backward(to(call, F64), grad.double(), need_reference=False)
    assert_near(one, expected.value, max(TOLERANCE[dtype], 1e-7))


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_sum_does_not_overflow(emulated: EmulatedBackend) -> None:
    value = torch.zeros(1, 1, 1, 4)
    points, weights = torch.full((1, 200, 1, 1, 1, 2), 0.5), torch.ones(1, 200, 1, 1, 1)
    call = Call.of(value, [1, 1], points, weights)
    found = emulated.backward(call, torch.full((1, 200, 4), -3.0), need_reference=False)
    assert found.value.flatten().tolist() == [-600.0] * 4
    found = emulated.backward(call, torch.zeros(1, 200, 4), need_reference=False)
    assert not found.value.any()


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["grad", "weights", "logits"])
def test_deterministic_hides_no_overflow(emulated: EmulatedBackend, where: str, bad: float) -> None:
    call = crowded_call(F32, 2 if where == "logits" else 0)
    grad = upstream(call)
    (grad if where == "grad" else call.weights).view(-1)[7] = bad
    assert emulated.backward(call, grad, need_reference=False).value.isnan().all()


class Asked(CudaBackend):
    """Keeps what it is asked to start, and starts nothing."""

    def __init__(self) -> None:
        self.launches: list[CudaLaunch] = []

    def run(self, name: str, launch: CudaLaunch) -> None:
        """See `CudaBackend`."""
        self.launches.append(launch)


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_gradients_do_not_wait_for_the_device() -> None:
    call, backend = to(make_call(F32, 32, 4, 2), F32, "meta"), Asked()  # has no numbers to wait for
    found = backend.backward(call, upstream(call), need_reference=False)
    assert found.value.shape == call.value.shape
    (launch,) = backend.launches
    assert launch.kind.deterministic
    assert launch.arrays["scale"].device.type == "meta"


# From here on with a GPU.


@pytest.fixture(scope="session")
def cuda() -> CudaBackend:
    """The backend, which must work where there is a GPU for it."""
    backend = CudaBackend()
    assert backend.unavailable(torch.device("cuda")) is None
    return backend


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "channels", "points", "form"), CASES)
def test_gpu_equals_reference(
    cuda: CudaBackend, dtype: torch.dtype, channels: int, points: int, form: int
) -> None:
    call = make_call(dtype, channels, points, form)
    on_gpu, exact, grad = to(call, dtype, "cuda"), to(call, F64), upstream(call)
    output = cuda.forward(on_gpu)
    assert_near(output, ReferenceBackend().forward(exact), TOLERANCE[dtype])
    for need_reference in (False, True) if form else (False,):
        found = cuda.backward(on_gpu, grad.cuda(), need_reference=need_reference)
        expected = ReferenceBackend().backward(exact, grad.double(), need_reference=need_reference)
        assert_gradients_near(found, expected, dtype)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(("dtype", "form"), [(F32, 0), (F32, 4), (F64, 0), (BF16, 2), (F16, 0)])
def test_gpu_deterministic_twice_the_same(cuda: CudaBackend, dtype: torch.dtype, form: int) -> None:
    call = to(crowded_call(dtype, form), dtype, "cuda")
    grad = upstream(call)
    first = cuda.backward(call, grad, need_reference=False)
    for _ in range(5):
        again = cuda.backward(call, grad, need_reference=False)
        assert again.value.equal(first.value)
        assert again.points.equal(first.points)
        assert again.weights.equal(first.weights)
    expected = ReferenceBackend().backward(
        to(call, F64, "cpu"), grad.cpu().double(), need_reference=False
    )
    assert_gradients_near(first, expected, dtype)


@pytest.mark.gpu
@needs_gpu
def test_gpu_follows_the_current_stream(cuda: CudaBackend) -> None:
    call = to(make_call(F32, 32, 4, 2), F32, "cuda")
    expected = cuda.forward(call)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        # long enough for a kernel on another stream to overtake the doubling
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        late = Call(call.value * 2, call.shapes, call.points, call.weights, call.reference)
        output = cuda.forward(late)
    stream.synchronize()
    torch.testing.assert_close(output, 2 * expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("same_bits", [False, True])
def test_gpu_captures_into_a_graph(cuda: CudaBackend, same_bits: bool) -> None:
    call = to(make_call(F32, 32, 4, 2), F32, "cuda")
    grad = upstream(call)

    def both() -> tuple[Tensor, ...]:
        with deterministic() if same_bits else nullcontext():
            found = cuda.backward(call, grad, need_reference=False)
        sums = (found.value,) if same_bits else ()
        return cuda.forward(call), found.points, *sums

    both()  # nothing is compiled or loaded while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    call.value.mul_(-3)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, both(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@needs_gpu
def test_gpu_in_a_thread_of_its_own(cuda: CudaBackend) -> None:
    call = to(make_call(F32, 32, 4, 0), F32, "cuda")
    outputs = [cuda.forward(call)]  # its memory is reused, so that the thread need not ask for any
    expected = outputs.pop().cpu()
    thread = threading.Thread(target=lambda: outputs.append(cuda.forward(call)))
    thread.start()
    thread.join()
    assert outputs[0].cpu().equal(expected)
