"""The Triton backend: in the interpreter on the CPU, compiled ahead of time, and on a GPU.

Whether kernels are interpreted is settled when Triton is imported, so the checks of the interpreter
run in a process of their own, once for all: this file, run as a program, prints what failed.
"""

import dataclasses
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops.call import BackendError, Call, Gradients
from ops.reference import ReferenceBackend
from ops.triton_backend import TritonBackend, forward_launch
from tests.unit.ops.oracle import SHAPES, Shapes, fused_oracle, loop_oracle, make_inputs
from tests.unit.ops.triton_ahead import TARGETS, compile_ahead

ROOT = Path(__file__).resolve().parents[3]
BACKEND = TritonBackend()
F32 = torch.float32


def make_call(
    form: int = 0, *, n: int = 2, q: int = 5, m: int = 2, d: int = 4, k: int = 2,
    shapes: Shapes = SHAPES, device: str = "cpu",
) -> Call:  # fmt: skip
    """Return a random call in float64, with points inside and outside; `form` as in the kernels."""
    value, _, points, weights = make_inputs(n, q, m, d, k, shapes)
    reference = None
    if form:
        reference = torch.rand(n, q, len(shapes), form, dtype=torch.float64) * 1.2 - 0.1
        points, weights = points * 4 - 2, weights * 4 - 2
    flat = [side for shape in shapes for side in shape]
    return to(Call.of(value, flat, points, weights, reference), device=device)


def to(call: Call, dtype: torch.dtype | None = None, device: str | None = None) -> Call:
    """Return a call whose value has another type, on another device."""
    flat = [side for shape in call.shapes for side in shape]
    value = call.value.to(device, dtype)
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    reference = None if call.reference is None else call.reference.to(device, exact)
    points, weights = call.points.to(device, exact), call.weights.to(device, exact)
    return Call.of(value, flat, points, weights, reference)


def gradient_for(call: Call) -> Tensor:
    """Return a gradient of the output in the dtype of the value."""
    return torch.randn(call.output_shape, dtype=torch.float64).to(call.value)


def close(actual: Gradients, expected: Gradients, rtol: float, atol: float) -> None:
    """Compare gradient by gradient."""
    assert (actual.reference is None) == (expected.reference is None)
    names = [field.name for field in dataclasses.fields(Gradients)]
    pairs = {name: (getattr(actual, name), getattr(expected, name)) for name in names}
    got = {name: a.double() for name, (a, _) in pairs.items() if a is not None}
    wanted = {name: b.double() for name, (_, b) in pairs.items() if b is not None}
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def check_forward(device: str, form: int = 0, k: int = 2, d: int = 4, q: int = 5) -> None:
    """A loop over samples gives the same output."""
    call = make_call(form, k=k, d=d, q=q)
    if call.reference is None:
        expected = loop_oracle(call.value, call.shapes, call.points, call.weights)
    else:
        expected = fused_oracle(call.value, call.shapes, call.reference, call.points, call.weights)
    actual = BACKEND.forward(to(call, device=device))
    torch.testing.assert_close(actual.cpu(), expected)


def check_backward(
    device: str, form: int = 0, need_reference: bool = False, k: int = 2, d: int = 4
) -> None:
    """The reference backend gives the same gradients."""
    call = make_call(form, n=1, k=k, d=d, device=device)
    grad = gradient_for(call)
    actual = BACKEND.backward(call, grad, need_reference=need_reference)
    expected = ReferenceBackend().backward(call, grad, need_reference=need_reference)
    assert actual.value.dtype == torch.float64
    close(actual, expected, rtol=1e-9, atol=1e-10)


def check_one_sample(device: str) -> None:
    """Axes of one element, everywhere at once."""
    call = make_call(n=1, q=1, m=1, d=1, k=1, shapes=[(1, 1)], device=device)
    grad = gradient_for(call)
    reference = ReferenceBackend()
    torch.testing.assert_close(BACKEND.forward(call), reference.forward(call))
    expected = reference.backward(call, grad, need_reference=False)
    close(BACKEND.backward(call, grad, need_reference=False), expected, rtol=1e-9, atol=1e-10)


def check_low_precision(device: str, dtype: torch.dtype) -> None:
    """Only values and results are rounded; sums are in float32."""
    call = to(make_call(2, n=1, d=16), dtype)
    grad = gradient_for(call)
    exact, low = to(call, torch.float64), to(call, device=device)
    step = max(torch.finfo(dtype).eps, 1e-5)
    output = BACKEND.forward(low).cpu()
    assert output.dtype == dtype
    expected = ReferenceBackend().forward(exact)
    torch.testing.assert_close(output.double(), expected, rtol=step, atol=1e-5)
    actual = on_cpu(BACKEND.backward(low, grad.to(device), need_reference=True))
    assert actual.value.dtype == dtype
    assert actual.points.dtype == actual.weights.dtype == torch.float32
    wanted = ReferenceBackend().backward(exact, grad.double(), need_reference=True)
    torch.testing.assert_close(actual.value.double(), wanted.value, rtol=step, atol=1e-5)
    close(dataclasses.replace(actual, value=wanted.value), wanted, rtol=1e-4, atol=1e-4)


def on_cpu(found: Gradients) -> Gradients:
    """Return the gradients in host memory."""
    reference = None if found.reference is None else found.reference.cpu()
    return Gradients(found.value.cpu(), found.points.cpu(), reference, found.weights.cpu())


def check_points_elsewhere(device: str) -> None:
    """Points far outside or NaN read zero, have zero gradients and do not disturb the others."""
    call = make_call(n=1, q=6, device=device)
    for i, bad in enumerate((float("nan"), float("inf"), -1e30, 3.0, -1e4)):
        call.points[:, i] = bad
    output = BACKEND.forward(call)
    assert output.isfinite().all()
    assert not output[:, :5].any()
    assert output[:, 5].all()
    found = BACKEND.backward(call, torch.ones_like(output), need_reference=False)
    assert all(t.isfinite().all() for t in (found.value, found.points, found.weights))
    assert not found.points[:, :5].any()
    assert not found.weights[:, :5].any()
    call.value.fill_(float("nan"))
    assert not BACKEND.forward(call)[:, :5].any()


def check_deterministic(device: str, dtype: torch.dtype) -> None:
    """Whole numbers add up to the same gradients, whichever way the queries are ordered."""
    call = to(make_call(2, n=1, q=12, d=8), dtype, device)
    grad = gradient_for(call)
    turned = dataclasses.replace(
        call, points=call.points.flip(1), weights=call.weights.flip(1),
        reference=None if call.reference is None else call.reference.flip(1),
    )  # fmt: skip
    expected = ReferenceBackend().backward(call, grad, need_reference=False)
    torch.use_deterministic_algorithms(True)
    try:
        found = BACKEND.backward(call, grad, need_reference=False)
        again = BACKEND.backward(turned, grad.flip(1), need_reference=False)
    finally:
        torch.use_deterministic_algorithms(False)
    close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.value, again.value)
    grad[0, 0, 0] = float("nan")
    torch.use_deterministic_algorithms(True)
    try:
        assert BACKEND.backward(call, grad, need_reference=False).value.isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def check_largest_sum(device: str) -> None:
    """Whole numbers do not overflow where every sample adds as much as one can to one cell."""
    call = make_call(n=1, q=32, m=1, d=1, k=4, shapes=[(1, 1)], device=device)
    call.points.fill_(0.5)
    call.weights.fill_(3.0)
    grad = torch.full(call.output_shape, 7.0, dtype=torch.float64, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        found = BACKEND.backward(call, grad, need_reference=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.value.item() == 32 * 4 * 3.0 * 7.0


def check_large_logits(device: str) -> None:
    """The softmax does not overflow."""
    call = make_call(2, n=1, device=device)
    call.weights.mul_(1000)
    torch.testing.assert_close(BACKEND.forward(call), ReferenceBackend().forward(call))


Check = Callable[[str], None]


CHECKS: dict[str, Check] = {
    "one sample": check_one_sample,
    "points elsewhere": check_points_elsewhere,
    "large logits": check_large_logits,
    "largest sum": check_largest_sum,
    "forward, 9 samples of 5 channels": partial(check_forward, k=3, d=5, q=9),
    "backward, 9 samples of 5 channels": partial(check_backward, k=3, d=5),
    "backward, fused, 9 samples": partial(check_backward, form=4, k=3, d=3),
    **{f"forward, form {f}": partial(check_forward, form=f) for f in (0, 2, 4)},
    **{f"backward, form {f}": partial(check_backward, form=f) for f in (0, 2, 4)},
    **{
        f"backward with reference, form {f}": partial(check_backward, form=f, need_reference=True)
        for f in (2, 4)
    },
    **{f"{t}": partial(check_low_precision, dtype=t) for t in (F32, torch.bfloat16, torch.float16)},
    **{f"deterministic, {t}": partial(check_deterministic, dtype=t) for t in (F32, torch.float64)},
}
NO_KERNELS = "import of ops brings no kernels"


@pytest.fixture(scope="session")
def failures() -> dict[str, str]:
    """Return what fails in Triton's interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.ops.test_triton"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", [NO_KERNELS, *CHECKS])
def test_in_the_interpreter(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not os.environ.get("REQUIRE_GPU"),
        reason="needs a CUDA device",
    ),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in CHECKS])
def test_on_a_gpu(name: str) -> None:
    assert BACKEND.unavailable(torch.device("cuda")) is None
    CHECKS[name]("cuda")


@pytest.mark.parametrize("form", [pytest.param(form, marks=gpu) for form in (0, 2, 4)])
def test_on_a_gpu_at_full_size(form: int) -> None:
    shapes = [(40, 50), (20, 25), (10, 13), (5, 7)]
    call = make_call(form, q=300, m=8, d=32, k=4, shapes=shapes, device="cuda")
    grad = gradient_for(call)
    expected = ReferenceBackend().backward(call, grad, need_reference=bool(form))
    wanted = ReferenceBackend().forward(call)
    for dtype, off in ((torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        low = to(call, dtype)
        output = BACKEND.forward(low)
        torch.testing.assert_close(output.double(), wanted, rtol=off, atol=off)
        actual = BACKEND.backward(low, grad.to(dtype), need_reference=bool(form))
        of_value = actual.value.double()
        torch.testing.assert_close(of_value, expected.value, rtol=off, atol=5 * off)


@pytest.mark.parametrize("captured", [pytest.param(c, marks=gpu) for c in (False, True)])
def test_a_call_waits_for_nothing_and_can_be_captured(captured: bool) -> None:
    def one(side: int) -> Call:
        return to(make_call(q=9, shapes=[(side, 5), (2, 3)]), torch.float32, "cuda")

    BACKEND.forward(one(3))  # compiles
    call = one(4)  # its levels have not been seen
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = BACKEND.forward(call)
            graph.replay()
        else:
            output = BACKEND.forward(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = ReferenceBackend().forward(call)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def compiled(target: str, backward: bool, form: int, dtype: torch.dtype, sums: str = "") -> str:
    """Return the assembly of a kernel for a usual call; `sums`: other than the points' type."""
    call = to(make_call(form, n=1, q=1, m=8, d=32, k=4, shapes=[(2, 2)] * 4), dtype)
    program, _ = compile_ahead(call, target, backward=backward, sums=sums)
    return str(program.asm["ptx" if target.startswith("sm") else "amdgcn"])


@pytest.mark.long
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for(target: str, backward: bool) -> None:
    assert compiled(target, backward, 2, torch.float32)
    assert compiled(target, backward, 4, torch.bfloat16)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiles_in_double_precision_and_whole_numbers(target: str) -> None:
    assert compiled(target, False, 0, torch.float64)
    assert compiled(target, True, 0, torch.float64)
    assert ".u64" in compiled(target, True, 0, torch.float32, sums="*i64")


@pytest.mark.parametrize("form", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_and_additions_are_of_16_bytes(dtype: torch.dtype, form: int) -> None:
    assert compiled("sm_90", False, form, dtype).count("ld.global.v4.b32") >= 4
    backward = compiled("sm_90", True, form, dtype)
    assert backward.count("add.v4.f32") == 4
    # no row moves between threads: what does is a number a sample
    assert "st.shared.v4" not in backward


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="Triton interprets")
@pytest.mark.parametrize(
    ("device", "reason"), [("mps", "not on mps"), ("cpu", "TRITON_INTERPRET"), ("xpu", "no GPU")]
)
def test_says_where_it_does_not_compute(device: str, reason: str) -> None:
    pytest.importorskip("triton")
    if device == "xpu" and torch.xpu.is_available():
        pytest.skip("there is one")
    said = BACKEND.unavailable(torch.device(device))
    assert said is not None
    assert reason in said


def test_triton_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ops.triton_kernels", raising=False)
    monkeypatch.delattr("ops.triton_kernels", raising=False)
    reason = BACKEND.unavailable(torch.device("cuda"))
    assert reason is not None
    assert "Triton cannot be imported" in reason


def test_rows_too_long_for_a_tile_are_refused() -> None:
    call = make_call(n=1, q=1, m=1, d=2**19, k=4, shapes=[(1, 1)])
    with pytest.raises(BackendError, match="do not fit in a tile"):
        forward_launch(call)


def _main() -> None:
    failures = {}
    if "ops.triton_kernels" in sys.modules:
        failures[NO_KERNELS] = "ops.triton_kernels is imported"
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check("cpu")
        except Exception:  # to be raised again by the test of this name
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    _main()
