"""Measure time, memory and multiplications of what encoder layers attend with, by image size.

    python -m tests.benchmarks.encoder_attention --out docs/images/encoder_attention.png

A forward and backward pass of one layer of width 256 (`msda`: 288) for one square image in four
levels, in a process of its own, on one core. Memory is the growth of the process's peak.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.probe import peak_memory, total_memory
from models.encoders import ENCODERS, Encoder, EncoderOptions
from models.encoders.attention import EncoderAttention
from models.levels import FeatureLevels, join_levels

SIDES = (256, 384, 512, 640, 800, 1066, 1333)
DROPOUT = 0.1
KINDS = (
    "deformable", "dense", "dense, no dropout", "mswin", "msda", "dat, stride 4",
    "enhancer, 80 classes",
)  # fmt: skip
COLOURS = ("#1f6fb5", "#c2570c", "#e0a06b", "#22805a", "#8050a0", "#b03060", "#606060")
_LONGEST = 40.0  # seconds of a pass, after which larger images are left out
_LARGEST = 0.25  # of the machine's memory: the backward pass takes as much again


def build(kind: str) -> Encoder:
    """Return an encoder of one layer."""
    attention = kind.split(",")[0]
    width, heads = (288, 9) if attention == "msda" else (256, 8)
    return ENCODERS["enhancer" if attention == "enhancer" else "mixed"](
        EncoderOptions(
            d_model=width,
            num_layers=1,
            d_ffn=1024,
            n_levels=4,
            n_heads=heads,
            n_points=4,
            dropout=0.0 if "no dropout" in kind else DROPOUT,
            attention=attention,
            dat_stride=4 if attention == "dat" else 1,
            num_classes=80,
        )  # fmt: skip
    )


def shapes_of(side: int) -> list[tuple[int, int]]:
    """Return the sizes of the levels of strides 8, 16, 32 and 64."""
    return [(-(-side // stride),) * 2 for stride in (8, 16, 32, 64)]


def levels_of(side: int, width: int) -> FeatureLevels:
    """Return random levels of one image."""
    maps = [torch.randn(1, width, *shape) for shape in shapes_of(side)]
    masks = [torch.zeros(1, *shape, dtype=torch.bool) for shape in shapes_of(side)]
    return join_levels(maps, masks, maps, torch.zeros(4, width))


def fits(encoder: Encoder, side: int) -> bool:
    """Return whether the attention weights leave room for all else."""
    kept = sum(
        4 * attention.kept(*shape)
        for attention in encoder.modules()
        if isinstance(attention, EncoderAttention)
        for shape in shapes_of(side)
    )
    return kept < _LARGEST * total_memory(torch.device("cpu"))


def learn(encoder: Encoder, levels: FeatureLevels) -> None:
    """Compute a forward and a backward pass."""
    output = encoder(levels)
    parts = output if isinstance(output, tuple) else (output,)  # with class tokens
    torch.autograd.backward([part.sum() for part in parts])


def measure(kind: str, side: int) -> dict[str, float]:
    """Return seconds and bytes of a pass, and multiplications of its forward part."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = build(kind)
    width = 288 if kind == "msda" else 256
    if not fits(encoder, side):
        return {}
    counter = FlopCounterMode(display=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        encoder.requires_grad_(False)  # the counter wants gradients of all that learns
        encoder(levels_of(side, width))  # on tensors that have shapes alone
    encoder.requires_grad_()
    levels = levels_of(side, width)
    levels.tokens.requires_grad_()
    learn(encoder, levels_of(64, width))  # builds and loads what the first call does
    before, seconds = peak_memory(torch.device("cpu")), []
    for _ in range(3):
        started = time.process_time()
        learn(encoder, levels)
        seconds.append(time.process_time() - started)
        if seconds[0] > 20:
            break
    return {
        "seconds": statistics.median(seconds),
        "bytes": peak_memory(torch.device("cpu")) - before,
        "products": counter.get_total_flops() / 2,
    }


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return seconds and memory as Markdown; what was left out or does not fit is a dash."""
    lines = [f"| side, pixels | {' | '.join(f'`{kind}`' for kind in KINDS)} |"]
    lines.append(f"|---|{'---|' * len(KINDS)}")
    for side in SIDES:
        cells = [
            f"{values['seconds']:.3g} s, {values['bytes'] / 2**30:.2f} GiB" if values else "-"
            for values in (found[kind].get(side) for kind in KINDS)
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draw all three over the side of the image."""
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    panels = (
        ("CPU seconds, forward and backward", "seconds", 1.0),
        ("GiB at the peak", "bytes", 2.0**30),
        ("multiplications in matrix products, billions", "products", 1e9),
    )
    for axes, (title, key, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for kind, colour in zip(KINDS, COLOURS, strict=True):
            points = {side: values[key] / unit for side, values in found[kind].items()}
            axes.plot([*points], [*points.values()], marker="o", ms=4, color=colour, label=kind)
        axes.set(xscale="log", yscale="log", title=title, xlabel="side of the image, pixels")
        axes.set_xticks(SIDES, [str(side) for side in SIDES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Measure every kind at every size, print a table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIDE"), help="measure this alone")
    parser.add_argument("--out", type=Path, default=Path("encoder_attention.png"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    found: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for side in SIDES:
            command = [sys.executable, "-m", __spec__.name, "--one", kind, str(side)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            values = json.loads(done.stdout.splitlines()[-1])
            if not values:
                print(f"{kind:18} {side:5}  does not fit", flush=True)
                continue
            found[kind][side] = values
            if values["seconds"] > _LONGEST:
                print(f"{kind:18} larger images are left out, after {values['seconds']:.0f} s")
                break
            print(
                f"{kind:18} {side:5}  {values['seconds']:8.2f} s  "
                f"{values['bytes'] / 2**30:6.2f} GiB  {values['products'] / 1e9:8.1f} G",
                flush=True,
            )
    print(table(found))
    draw(found, options.out)


if __name__ == "__main__":
    main()
