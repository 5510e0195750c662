"""Time the op against its PyTorch definition and against other packages, in one process.

    python -m ops.benchmark --output FILE.json           # every case, on the CPU
    python -m ops.benchmark --cases encoder_800 decoder_800 --device cuda
    MALLOC_MMAP_THRESHOLD_=65536 python -m ops.benchmark --checks    # memory, errors; Linux

Implementations take turns: each is sampled once per round. The result is the median of the samples;
beside it stands their spread, the interquartile range in percent of the median. A sample is many
calls, one after the other, and so finds in the caches what the call before left there; in rows that
say "cold", it is one call after other data have filled them, as between the layers of a model.
`--checks` measures peak memory beyond results and gradients, and errors against float64.
"""

import argparse
import gc
import importlib.util
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Measurement, Timer

from .ms_deform_attn import fused_ms_deform_attn
from .plain import ms_deform_attn
from .reference import sampling_locations

_SAMPLE = 0.2  # seconds, at least: several calls in a row
_COLD = ", cold"
_OTHER_DATA = 256 << 20  # bytes, several times the largest cache
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
    "one_query": Case(((2, 2),) * 4, 1),  # what a call takes beside its arithmetic
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
        grids = [
            torch.cartesian_prod(*(torch.arange(side) / side + 0.5 / side for side in shape))
            for shape in shapes
        ]
        centres = torch.cat(grids).flip(-1).expand(n, -1, -1)
    else:
        centres = torch.rand(n, case.queries, 2, generator=generator)
    q = centres.shape[1]
    reference = centres[:, :, None].expand(-1, -1, len(shapes), -1).contiguous()
    angles = torch.arange(m) * (2 * math.pi / m)
    direction = torch.stack([angles.cos(), angles.sin()], -1)[:, None, None]
    noise = torch.randn(n, q, m, len(shapes), k, 2, generator=generator)
    offsets = direction * torch.arange(1, k + 1)[:, None] + noise
    logits = torch.randn(n, q, m, len(shapes), k, generator=generator)
    locations = sampling_locations(reference, offsets, shapes)
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    value = torch.randn(n, tokens, m, _CHANNELS, generator=generator)
    rest = (t.to(device) for t in (reference, offsets, logits, locations, weights))
    return Inputs(value.to(device, dtype), shapes, *rest)


Call = Callable[[], tuple[Tensor, list[Tensor]]]


def definition(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample levels with `grid_sample`, stack, weight and sum, as the official code does."""
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


def implementations(inputs: Inputs, *, grad: bool) -> dict[str, Call]:
    """Return calls by name; each returns an output and the leaves to differentiate."""

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.detach().requires_grad_(grad) for t in tensors]

    plain = leaves(inputs.value, inputs.locations, inputs.weights)
    fused = leaves(inputs.value, inputs.offsets, inputs.logits)
    shapes, reference = inputs.shapes, inputs.reference
    table = torch.tensor(shapes, device=inputs.value.device)
    starts = torch.cat([table.new_zeros(1), table.prod(1).cumsum(0)[:-1]])
    sizes = table.flip(1)[:, None]  # (W, H)

    def separate() -> tuple[Tensor, Tensor]:
        weights = fused[2].flatten(3).softmax(-1).view_as(fused[2])
        return reference[:, :, None, :, None] + fused[1] / sizes, weights

    calls: dict[str, Call] = {
        "definition": lambda: (definition(plain[0], shapes, plain[1], plain[2]), plain),
        "ours": lambda: (ms_deform_attn(plain[0], shapes, plain[1], plain[2]), plain),
        "definition, softmax and locations": lambda: (
            definition(fused[0], shapes, *separate()),
            fused,
        ),
        "ours, fused": lambda: (
            fused_ms_deform_attn(fused[0], shapes, reference, fused[1], fused[2]),
            fused,
        ),
    }
    if inputs.value.device.type == "cpu" and inputs.value.dtype == torch.float32:
        low = leaves(inputs.value.bfloat16(), inputs.locations, inputs.weights)
        calls["ours, bfloat16"] = lambda: (ms_deform_attn(low[0], shapes, low[1], low[2]), low)
    # other packages, where they are installed
    if importlib.util.find_spec("torch_ms_deform_attn"):
        from torch_ms_deform_attn import ms_deform_attn as peer

        calls["torch-ms-deform-attn"] = lambda: (
            peer(plain[0], table, starts, plain[1], plain[2]),
            plain,
        )
    if importlib.util.find_spec("deformops"):
        from deformops.registry import msda as other

        calls["deformops"] = lambda: (
            other(plain[0], table, starts, plain[1], plain[2], method="linear"),
            plain,
        )
    return calls


def time_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    grad: bool,
    samples: int,
    without: Collection[str] = (),
) -> dict[str, Measurement]:
    """Return `samples` times of a call, or more, by implementation.

    The gradient of the output is made beforehand and not timed.
    """
    other_data = torch.zeros(_OTHER_DATA // 4, device=device)
    warm, cold = [], []
    for name, call in implementations(make_inputs(case, device, dtype), grad=grad).items():
        if name in without:
            continue
        task: dict[str, Any] = {
            "stmt": "torch.autograd.grad(*call(), seed)" if grad else "call()",
            "globals": {"call": call, "seed": torch.ones_like(call()[0]), "other": other_data},
            "num_threads": torch.get_num_threads(),
        }
        warm.append(Timer(**task, description=name))
        if case.queries is not None:  # an encoder's tensors do not fit in a cache anyway
            cold.append(Timer(**task, description=name + _COLD, setup="other.add_(1)"))
    taken = []
    for _ in range(samples):
        taken += [timer.blocked_autorange(min_run_time=_SAMPLE) for timer in warm]
        taken += [timer.timeit(1) for timer in cold]  # the setup runs before each
    merged = Measurement.merge(taken)
    return {str(measured.task_spec.description): measured for measured in merged}


def _resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_memory(call: Call, *, grad: bool) -> float:
    """Return the peak memory of a call beyond its output and gradients, as a fraction of these."""
    seed = torch.ones_like(call()[0])
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    output, leaves = call()
    results = [output, *(torch.autograd.grad(output, leaves, seed) if grad else ())]
    peak = _resident("VmHWM") - before
    return peak / sum(t.nbytes for t in results) - 1


def _results(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return an output and the gradients of a weighted sum of it, in double precision."""
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    grads = torch.autograd.grad(output, leaves, weight.to(output.dtype))
    return [t.detach().double() for t in (output, *grads)]


def check_case(case: Case) -> dict[str, dict[str, list[float]]]:
    """Return the memory and errors of the definition and of ours on the CPU, in float32.

    An error is relative, in the L2 norm: of the output, then of every gradient.
    """
    inputs = make_inputs(case, torch.device("cpu"), torch.float32)
    doubles: Any = {k: t.double() for k, t in inputs._asdict().items() if isinstance(t, Tensor)}
    exact = implementations(inputs._replace(**doubles), grad=True)
    forward, both = (implementations(inputs, grad=grad) for grad in (False, True))
    results: dict[str, dict[str, list[float]]] = {}
    for name in ("definition", "ours", "definition, softmax and locations", "ours, fused"):
        memory = [extra_memory(forward[name], grad=False), extra_memory(both[name], grad=True)]
        pairs = zip(_results(*both[name]()), _results(*exact[name]()), strict=True)
        errors = [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
        results[name] = {"memory": memory, "errors": errors}
        print(
            f"  {name:36s} memory {memory[0]:+.0%} {memory[1]:+.0%}  errors "
            + " ".join(f"{e:.1e}" for e in errors)
        )
    return results


def report(name: str, what: str, times: dict[str, Measurement]) -> None:
    """Print one table: milliseconds, their spread, and the speed relative to the definition."""
    print(f"\n{name}, {what}")
    for implementation, measured in times.items():
        fused = "fused" in implementation or "softmax" in implementation
        definition = "definition, softmax and locations" if fused else "definition"
        base = times.get(definition + (_COLD if implementation.endswith(_COLD) else ""))
        speed = f"{base.median / measured.median:7.1f}x" if base else ""
        spread = measured.iqr / measured.median
        print(f"  {implementation:40s} {1000 * measured.median:9.3f} ms ±{spread:4.0%} {speed}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--samples", type=int, default=5, help="rounds, one sample of each in each")
    parser.add_argument("--without", nargs="+", default=[], help="implementations to leave out")
    parser.add_argument("--checks", action="store_true", help="memory and errors instead of times")
    parser.add_argument("--output", type=Path, help="write the milliseconds as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {name: {} for name in options.cases}
    for name in options.cases:
        if options.checks:
            print(
                f"{name}: memory beyond results (forward, forward + backward), errors of output and"
            )
            print("  of the gradients of value, locations or offsets, weights or logits")
            results[name] = check_case(CASES[name])
            continue
        for what, grad in (("forward", False), ("forward + backward", True)):
            times = time_case(
                CASES[name],
                options.device,
                getattr(torch, options.dtype),
                grad=grad,
                samples=options.samples,
                without=options.without,
            )
            report(name, what, times)
            results[name][what] = {k: 1000 * measured.median for k, measured in times.items()}
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
