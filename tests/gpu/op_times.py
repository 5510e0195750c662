"""The op on the GPU: every backend, against the PyTorch definition and against other packages.

Two times of each call: `ms` by events around calls as a program makes them, and `graph_ms` of the
same kernels replayed from a CUDA graph, without Python. `copied` is the fraction of the card's
copy bandwidth that the tensors read and written once would make of it: 1 is the best possible
where nothing stays in the cache.
"""

import argparse
import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import use_backend
from ops.backends import BACKENDS
from ops.benchmark import CASES, Call, Case, Inputs, implementations, make_inputs
from tests.gpu.results import emit, remaining

NAMES = ("encoder_800", "decoder_800", "encoder_512")
BATCHES = (1, 2, 8)
DTYPES = (torch.float32, torch.bfloat16)
TOY = Case(((6, 8), (3, 4)), None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch for the same bits on every run."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def contenders(
    inputs: Inputs, *, grad: bool, official: Any
) -> dict[str, tuple[Call, Callable[[], Any]]]:
    """Return calls by name, each with the context that it runs in."""
    device = inputs.value.device
    calls = implementations(inputs, grad=grad)
    found: dict[str, tuple[Call, Callable[[], Any]]] = {}
    for name, call in calls.items():
        if not name.startswith("ours"):
            found[name] = (call, contextlib.nullcontext)
    for backend in BACKENDS.values():
        if backend.name == "reference" or backend.unavailable(device):
            continue
        for name in ("ours", "ours, fused"):
            label = name.replace("ours", backend.name)
            found[label] = (calls[name], partial(use_backend, backend.name))
    found["deterministic"] = (calls["ours"], deterministic)
    if official is not None:
        found["official"] = (official_call(inputs, official, grad=grad), contextlib.nullcontext)
    return found


def official_call(inputs: Inputs, official: Any, *, grad: bool) -> Call:
    """Return a call of the official kernel."""
    leaves = [t.detach().requires_grad_(grad) for t in (inputs.value, inputs.locations)]
    leaves.append(inputs.weights.detach().requires_grad_(grad))
    table = torch.tensor(inputs.shapes, device=inputs.value.device)
    starts = torch.cat([table.new_zeros(1), table.prod(1).cumsum(0)[:-1]])

    class Official(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, *tensors: Tensor) -> Tensor:
            context.save_for_backward(*tensors)
            output: Tensor = official.ms_deform_attn_forward(
                tensors[0], table, starts, tensors[1], tensors[2], 64
            )
            return output

        @staticmethod
        def backward(context: Any, grad_output: Tensor) -> Any:
            value, locations, weights = context.saved_tensors
            return official.ms_deform_attn_backward(
                value, table, starts, locations, weights, grad_output.contiguous(), 64
            )

    def call() -> tuple[Tensor, list[Tensor]]:
        output: Tensor = Official.apply(*leaves)
        return output, leaves

    return call


def load_official(folder: Path | None) -> Any:
    """Return the official extension from the folder it was built in, None without one."""
    if folder is None:
        return None
    built = [p.parent for p in folder.rglob("MultiScaleDeformableAttention*.so")]
    if not built:
        emit("op", official=f"no MultiScaleDeformableAttention*.so under {folder}: build it there")
        return None
    sys.path.insert(0, str(built[0]))
    return importlib.import_module("MultiScaleDeformableAttention")


def clocked(run: Callable[[], Any], device: torch.device, times: int) -> float:
    """Return the milliseconds of a call among `times` calls."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) / times * 1e3
    begin: Any
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def time_call(call: Call, device: torch.device, *, grad: bool) -> dict[str, float]:
    """Return the median of seven samples, called from Python and replayed from a graph."""
    with torch.set_grad_enabled(grad):
        seed = torch.ones_like(call()[0])

        def run() -> None:
            output, leaves = call()
            if grad:
                torch.autograd.grad(output, leaves, seed)

        for _ in range(3):
            run()
        times = max(1, min(50, round(10 / clocked(run, device, 3))))
        found = {"ms": statistics.median(clocked(run, device, times) for _ in range(7))}
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                run()  # the allocator and autograd warm up where the capture takes place
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            found["graph_ms"] = statistics.median(
                clocked(graph.replay, device, times) for _ in range(7)
            )
    return found


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Return bytes per second of a copy on the device, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    ms = statistics.median(clocked(lambda: target.copy_(source), device, 5) for _ in range(5))
    return 2 * size / ms * 1e3


def bytes_moved(inputs: Inputs, *, grad: bool) -> int:
    """Return the bytes of all tensors that a call must read and write once."""
    read = inputs.value.nbytes + inputs.locations.nbytes + inputs.weights.nbytes
    output = inputs.value[:, 0].nbytes * inputs.locations.shape[1]
    return read + output + ((read + output) + read if grad else 0)


def time_case(
    name: str, case: Case, dtype: torch.dtype, device: torch.device, bandwidth: float, official: Any
) -> bool:
    """Emit the times of every implementation, forward and with backward; return if all worked."""
    passed = True
    inputs = make_inputs(case, device, dtype)
    for grad in (False, True):
        what = "forward + backward" if grad else "forward"
        for label, (call, context) in contenders(inputs, grad=grad, official=official).items():
            if remaining() < 5:
                return passed
            values: dict[str, Any]
            try:
                with context():
                    values = dict(time_call(call, device, grad=grad))
                best = min(v for v in values.values())
                values["copied"] = bytes_moved(inputs, grad=grad) / (best / 1e3) / bandwidth
            except Exception as error:  # one that fails must not cost the others
                passed = False
                values = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            emit(
                "op", case=name, batch=case.batch, dtype=str(dtype).removeprefix("torch."),
                what=what, implementation=label,
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()},
            )  # fmt: skip
    return passed


def main() -> int:
    """Run the command line; return 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--official_op", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda")
    official = load_official(options.official_op)
    bandwidth = copy_bandwidth(device, 2**20 if options.dry else 2**30)
    emit("op", copy_gb_per_s=round(bandwidth / 1e9, 1))
    cases = {"toy": TOY} if options.dry else {name: CASES[name] for name in NAMES}
    passed = True
    for batch in BATCHES[: 1 if options.dry else None]:
        for name, case in cases.items():
            for dtype in DTYPES:
                sized = replace(case, batch=batch)
                passed &= time_case(name, sized, dtype, device, bandwidth, official)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
