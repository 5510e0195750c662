"""Time the op against its PyTorch definition and against other packages, in one process.

    python -m ops.benchmark --output FILE.json           # every case, on the CPU
    python -m ops.benchmark --cases encoder_800 decoder_800 --device cuda
    MALLOC_MMAP_THRESHOLD_=65536 python -m ops.benchmark --checks    # memory, errors; Linux

Implementations take turns within a round. The result is the median over quiet samples, in which our
threads waited for a processor less than 4 % of the time. `--checks` measures peak memory beyond
results and gradients, and errors against float64.
"""

import argparse
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ms_deform_attn import fused_ms_deform_attn, ms_deform_attn

_MAX_WAITING = 0.04  # fraction of a quiet sample that our threads may wait for a processor
_SAMPLE = 0.02  # seconds
_HEADS, _CHANNELS, _POINTS = 8, 32, 4


@dataclass(frozen=True)
class Case:
    """Levels and queries of one layer, 8 heads of 32 channels, 4 points."""

    shapes: tuple[tuple[int, int], ...]
    queries: int | None  # None: every token is a query, as in the encoder
    batch: int = 1


_LARGE = ((100, 134), (50, 67), (25, 34), (13, 17))  # an 800 x 1066 image
_SQUARE = ((64, 64), (32, 32), (16, 16), (8, 8))  # 512 x 512
CASES = {
    "encoder_800": Case(_LARGE, None),
    "encoder_512": Case(_SQUARE, None),
    "decoder_800": Case(_LARGE, 300),
    "encoder_800_batch_2": Case(_LARGE, None, 2),
    "encoder_512_batch_2": Case(_SQUARE, None, 2),
    "decoder_800_batch_2": Case(_LARGE, 300, 2),
}


class Inputs(NamedTuple):
    """Equivalent inputs of both forms."""

    value: Tensor
    shapes: tuple[tuple[int, int], ...]
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return samples like those of a trained layer: near the query, along the head's direction."""
    generator = torch.Generator().manual_seed(0)
    shapes, n, m, k = case.shapes, case.batch, _HEADS, _POINTS
    tokens = sum(h * w for h, w in shapes)
    if case.queries is None:
        grids = [_centres(h, w) for h, w in shapes]
        centres = torch.cat(grids).expand(n, -1, -1)
    else:
        centres = torch.rand(n, case.queries, 2, generator=generator)
    q = centres.shape[1]
    reference = centres[:, :, None].expand(-1, -1, len(shapes), -1).contiguous()
    angles = torch.arange(m) * (2 * math.pi / m)
    direction = torch.stack([angles.cos(), angles.sin()], -1)[:, None, None]
    steps = torch.arange(1, k + 1)[:, None]
    noise = torch.randn(n, q, m, len(shapes), k, 2, generator=generator)
    offsets = direction * steps + noise
    logits = torch.randn(n, q, m, len(shapes), k, generator=generator)
    sizes = torch.tensor([(w, h) for h, w in shapes])
    locations = reference[:, :, None, :, None] + offsets / sizes[:, None]
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    value = torch.randn(n, tokens, m, _CHANNELS, generator=generator)
    rest = (t.to(device) for t in (reference, offsets, logits, locations, weights))
    return Inputs(value.to(device, dtype), shapes, *rest)


def _centres(height: int, width: int) -> Tensor:
    rows, columns = (torch.arange(side) / side + 0.5 / side for side in (height, width))
    return torch.cartesian_prod(rows, columns).flip(-1)


def pytorch_definition(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample level by level with `grid_sample`, stack, weight and sum.

    The official code and its derivatives compute these steps where their compiled op is missing.
    """
    n, _, m, d = value.shape
    q, levels, k = weights.shape[1], len(shapes), weights.shape[4]
    grids = 2 * locations - 1
    sampled = []
    for level, tokens in enumerate(torch.split(value, [h * w for h, w in shapes], dim=1)):
        maps = tokens.flatten(2).transpose(1, 2).reshape(n * m, d, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid.to(maps.dtype), align_corners=False))
    stacked = torch.stack(sampled, dim=-2).flatten(-2)
    shares = weights.transpose(1, 2).reshape(n * m, 1, q, levels * k).to(stacked.dtype)
    return (stacked * shares).sum(-1).view(n, m * d, q).transpose(1, 2).contiguous()


Call = Callable[[], tuple[Tensor, list[Tensor]]]


def implementations(inputs: Inputs, *, grad: bool) -> dict[str, Call]:
    """Return calls by name; each returns an output and the leaves to differentiate."""

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.detach().requires_grad_(grad) for t in tensors]

    plain = leaves(inputs.value, inputs.locations, inputs.weights)
    fused = leaves(inputs.value, inputs.offsets, inputs.logits)
    shapes = inputs.shapes
    device = inputs.value.device
    table = torch.tensor(shapes, device=device)
    starts = torch.cat([table.new_zeros(1), table.prod(1).cumsum(0)[:-1]])
    sizes = torch.tensor([(w, h) for h, w in shapes], device=device)

    def separate() -> tuple[Tensor, Tensor]:
        around = inputs.reference[:, :, None, :, None]
        locations = around + fused[1] / sizes[:, None]
        return locations, fused[2].flatten(3).softmax(-1).view_as(fused[2])

    calls: dict[str, Call] = {
        "definition": lambda: (pytorch_definition(plain[0], shapes, plain[1], plain[2]), plain),
        "ours": lambda: (ms_deform_attn(plain[0], shapes, plain[1], plain[2]), plain),
        "definition, softmax and locations": lambda: (
            pytorch_definition(fused[0], shapes, *separate()),
            fused,
        ),
        "ours, fused": lambda: (
            fused_ms_deform_attn(fused[0], shapes, inputs.reference, fused[1], fused[2]),
            fused,
        ),
    }
    if device.type == "cpu" and inputs.value.dtype == torch.float32:
        low = leaves(inputs.value.bfloat16(), inputs.locations, inputs.weights)
        calls["ours, bfloat16"] = lambda: (ms_deform_attn(low[0], shapes, low[1], low[2]), low)
    calls.update(_peers(plain, table, starts))
    return calls


def _peers(plain: list[Tensor], table: Tensor, starts: Tensor) -> dict[str, Call]:
    """Return the packages that are installed here."""
    peers: dict[str, Call] = {}
    if importlib.util.find_spec("torch_ms_deform_attn"):
        from torch_ms_deform_attn import ms_deform_attn as peer

        peers["torch-ms-deform-attn"] = lambda: (
            peer(plain[0], table, starts, plain[1], plain[2]),
            plain,
        )
    if importlib.util.find_spec("deformops"):
        from deformops.registry import msda as other

        peers["deformops"] = lambda: (
            other(plain[0], table, starts, plain[1], plain[2], method="linear"),
            plain,
        )
    return peers


def _waited() -> float:
    """Return the seconds that threads of this process have waited for a processor until now."""
    threads = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[1]) for path in threads) / 1e9


def _sample(call: Call, device: torch.device, *, grad: bool) -> tuple[float, float]:
    """Return the seconds of a call and the fraction of them that our threads waited.

    One call warms up, then enough calls to fill `_SAMPLE` seconds are timed. The gradient of the
    output is made beforehand and not timed.
    """
    with torch.set_grad_enabled(grad):
        seed = torch.ones_like(call()[0]) if grad else None

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            with torch.set_grad_enabled(grad):
                output, leaves = call()
                if grad:
                    torch.autograd.grad(output, leaves, seed)
            del output, leaves
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    gc.collect()
    waited, begin = _waited(), time.perf_counter()
    warm = run(1)
    seconds = run(max(1, round(_SAMPLE / warm)))
    return seconds, (_waited() - waited) / (time.perf_counter() - begin)


def time_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    grad: bool,
    samples: int,
    tries: int,
    without: Sequence[str] = (),
) -> dict[str, float]:
    """Return the median milliseconds of every implementation, NaN if no sample was quiet."""
    calls = implementations(make_inputs(case, device, dtype), grad=grad)
    calls = {name: call for name, call in calls.items() if name not in without}
    quiet: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(tries):
        for name, call in calls.items():
            if len(quiet[name]) < samples:
                seconds, waiting = _sample(call, device, grad=grad)
                if waiting < _MAX_WAITING:
                    quiet[name].append(1000 * seconds)
        if all(len(times) >= samples for times in quiet.values()):
            break
    return {name: statistics.median(t) if t else math.nan for name, t in quiet.items()}


def _resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_memory(call: Call, *, grad: bool) -> float:
    """Return the peak memory of a call beyond its output and gradients, as a fraction of these."""
    with torch.set_grad_enabled(grad):
        output, leaves = call()
        results = output.nbytes + (sum(t.nbytes for t in leaves) if grad else 0)
        seed = torch.ones_like(output)
        del output
        gc.collect()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        output, leaves = call()
        kept = torch.autograd.grad(output, leaves, seed) if grad else ()
        peak = _resident("VmHWM") - before
        del kept
    return peak / results - 1


def errors(call: Call, exact: Call) -> list[float]:
    """Return the relative error of the output and of every gradient, in the L2 norm."""
    found, expected = (_results(*c()) for c in (call, exact))
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def _results(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(output.dtype))]


def check_case(case: Case) -> dict[str, dict[str, list[float]]]:
    """Return the memory and errors of the definition and of ours on the CPU, in float32."""
    inputs = make_inputs(case, torch.device("cpu"), torch.float32)
    doubles: Any = {k: t.double() for k, t in inputs._asdict().items() if isinstance(t, Tensor)}
    precise = inputs._replace(**doubles)
    exact = implementations(precise, grad=True)
    results: dict[str, dict[str, list[float]]] = {}
    for name in ("definition", "ours", "definition, softmax and locations", "ours, fused"):
        memory = [
            extra_memory(implementations(inputs, grad=grad)[name], grad=grad)
            for grad in (False, True)
        ]
        found = errors(implementations(inputs, grad=True)[name], exact[name])
        results[name] = {"memory": memory, "errors": found}
        print(
            f"  {name:36s} memory {memory[0]:+.0%} {memory[1]:+.0%}  errors "
            + " ".join(f"{e:.1e}" for e in found)
        )
    return results


def report(name: str, what: str, medians: dict[str, float]) -> None:
    """Print one table: milliseconds, and the speed relative to the definition."""
    print(f"\n{name}, {what}")
    for implementation, ms in medians.items():
        fused = "fused" in implementation or "softmax" in implementation
        base = medians["definition, softmax and locations" if fused else "definition"]
        print(f"  {implementation:36s} {ms:9.2f} ms {base / ms:7.1f}x")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--samples", type=int, default=5, help="quiet samples per implementation")
    parser.add_argument("--tries", type=int, default=40, help="maximum number of rounds")
    parser.add_argument("--without", nargs="+", default=[], help="implementations to leave out")
    parser.add_argument("--checks", action="store_true", help="memory and errors instead of times")
    parser.add_argument("--output", type=Path, help="write the milliseconds as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    results: dict[str, Any] = {}
    for name in options.cases:
        if options.checks:
            print(
                f"{name}: memory beyond results (forward, forward + backward), errors of output and"
            )
            print("  of the gradients of value, locations or offsets, weights or logits")
            results[name] = check_case(CASES[name])
            continue
        for what, grad in (("forward", False), ("forward + backward", True)):
            medians = time_case(
                CASES[name], options.device, dtype, grad=grad, samples=options.samples,
                tries=options.tries, without=options.without,
            )  # fmt: skip
            report(name, what, medians)
            results.setdefault(name, {})[what] = medians
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
