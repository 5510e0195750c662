"""Simulate a training step on 1 to 1,024 GPUs, and check the simulation with real processes.

    python -m tests.benchmarks.many_gpus --coco_path ../shared/datasets/coco_by --plot scaling.svg
    python -m tests.benchmarks.many_gpus --check

A step takes as long as its slowest process needs for its own images, or as long as their loading if
that is longer, and then as long as the part of the all-reduce that the backward pass does not hide.
Sizes of images are measured: what the training transform makes of real ones. So is the number of
bytes. Seconds of an image, networks and processors of a GPU are assumed; see `Machine`.

`--check` runs real processes that exchange real bytes; in place of computing they wait for as long
as the model says, as a processor waits for its GPU.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import distributed

from configs.load import read_options
from configs.schema import DataConfig
from datasets.build import build_dataset, load_index
from datasets.dataset import SampleKey
from models.build import build_model
from util.batch import UnreadableImage

Floats = NDArray[np.float64]

# Deformable DETR's README: an epoch of 118,287 images takes 6.5 GPU hours (V100), at 32 a step
PUBLISHED = 2 * 6.5 * 3600 / 118_287  # seconds of a step of 16 GPUs with 2 images each
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PORT = 29533


@dataclass(frozen=True)
class Machine:
    """What is assumed of the hardware.

    Units: `image`, seconds that one GPU needs for an image of mean size, forward and backward, at
    2 images a batch; `inside` and `between`, bytes a second of a GPU in a node of 8 and of the
    node's link to others; `latency`, seconds of an exchange per doubling of the processes;
    `hidden`, the share of the computation during which gradients can be on their way; `loader`,
    images that a core prepares in a second, and cores of each GPU.
    """

    image: float
    inside: float = 120e9
    between: float = 12.5e9
    latency: float = 150e-6
    hidden: float = 0.5
    loader: float = 159.0
    cores: float = 4.0
    images: int = 2


@dataclass(frozen=True)
class Sizes:
    """What a transform made of images: their sides [E,N,2], of each batch, and which are upright.

    All images of a row were prepared as if they were in one batch.
    """

    sides: Floats
    upright: NDArray[np.bool_]
    grouped: bool = False

    def padded(self, steps: int, gpus: int, images: int, draw: np.random.Generator) -> Floats:
        """Return the pixels of each GPU's padded batch [steps,gpus]."""
        batch, number = np.arange(steps) % len(self.sides), len(self.upright)
        if self.grouped:  # a step's images are all upright or all lying
            kinds = draw.random(steps) < self.upright.mean()
            of_kind = [np.flatnonzero(self.upright == kind) for kind in (False, True)]
            chosen = np.stack([draw.choice(of_kind[int(kind)], (gpus, images)) for kind in kinds])
        else:
            chosen = draw.integers(0, number, (steps, gpus, images))
        sides = self.sides[batch[:, None, None], chosen]
        return np.asarray(images * sides.max(axis=2).prod(axis=2))


@dataclass(frozen=True)
class Step:
    """Mean seconds of a step, and of its parts."""

    total: float
    compute: float  # of a GPU, on average
    waiting: float  # for the slowest
    exchange: float  # that is not hidden
    loading: float  # beyond the computation


def all_reduce(machine: Machine, gpus: int, num_bytes: float) -> float:
    """Return the seconds of an all-reduce: a ring in the node, and one of nodes."""
    inside = min(gpus, 8)
    nodes = -(-gpus // 8)
    seconds = 2 * (inside - 1) / inside * num_bytes / machine.inside
    seconds += 2 * (nodes - 1) / nodes * num_bytes / machine.between
    return float(seconds + machine.latency * np.log2(gpus))


def simulate(
    sizes: Sizes, machine: Machine, gpus: int, num_bytes: float, mean_pixels: float, steps: int
) -> Step:
    """Return the mean of some steps; `mean_pixels` are those of an image that takes the time."""
    pixels = sizes.padded(steps, gpus, machine.images, np.random.default_rng(gpus))
    compute = pixels / mean_pixels * machine.image
    slowest = compute.max(axis=1)
    exchange = max(0.0, all_reduce(machine, gpus, num_bytes) - machine.hidden * compute.mean())
    loading = machine.images / (machine.loader * machine.cores)
    late = np.maximum(loading - slowest - exchange, 0).mean()
    waiting = (slowest - compute.mean(axis=1)).mean()
    total = (slowest + exchange).mean() + late
    return Step(*map(float, (total, compute.mean(), waiting, exchange, late)))


def calibrate(sizes: Sizes, num_bytes: float, mean_pixels: float, steps: int) -> float:
    """Return the seconds of an image at which a step of 16 GPUs takes what was published."""
    step = simulate(sizes, Machine(PUBLISHED), 16, num_bytes, mean_pixels, steps)
    return PUBLISHED * PUBLISHED / (step.compute + step.waiting)


def measure_sizes(cfg: DataConfig, epochs: int) -> Sizes:
    """Return the sides of all training images in so many batches, each prepared as in training."""
    index = load_index(cfg, "train")
    dataset = build_dataset(cfg, index, train=True, mean=_MEAN, std=_STD)
    rows = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        items = [dataset[SampleKey(i, 0)] for i in range(len(index))]
        assert not any(isinstance(item, UnreadableImage) for item in items)
        rows.append([tuple(item[0].shape[-2:]) for item in items])  # type: ignore[index]
    stored = index.images.sizes
    upright = np.asarray(stored[:, 0] > stored[:, 1])
    return Sizes(np.array(rows, dtype=np.float64), upright, cfg.aspect_ratio_grouping)


def gradient_bytes(config: str) -> int:
    """Return the bytes of all gradients of a preset's model."""
    model = build_model(read_options(config, {}).config().model, num_classes=91)
    return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


CASES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "V100, as published": ({}, {}),
    "--aspect_ratio_grouping": ({"aspect_ratio_grouping": True}, {}),
    "--one_scale_per_batch": ({"one_scale_per_batch": True}, {}),
    "both options": ({"one_scale_per_batch": True, "aspect_ratio_grouping": True}, {}),
    "--fixed_size 800": ({"fixed_size": 800}, {}),
    "10 Gbit/s between nodes": ({}, {"between": 1.25e9}),
    "a card 6 times as fast": ({}, {"times": 6}),
    "6 times as fast, both options": (
        {"one_scale_per_batch": True, "aspect_ratio_grouping": True}, {"times": 6},
    ),
    "6 times as fast, 1 core for 4 GPUs": ({}, {"times": 6, "cores": 0.25}),
    "6 times as fast, 10 Gbit/s": ({}, {"times": 6, "between": 1.25e9}),
}  # fmt: skip
DRAWN = (0, 3, 5, 7, 8, 9)  # of them, in the plot


def tables(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate all cases and print them."""
    num_bytes = gradient_bytes(args.config)
    base = DataConfig(coco_path=args.coco_path)
    measured: dict[str, Sizes] = {}
    result: dict[str, Any] = {"bytes": num_bytes, "cases": {}}
    image = mean_pixels = 0.0
    for name, (data, hardware) in CASES.items():
        key = json.dumps(data)
        if key not in measured:
            measured[key] = measure_sizes(replace(base, **data), args.epochs)
        sizes = measured[key]
        official = measured["{}"]
        mean_pixels = float(official.sides.prod(axis=2).mean())
        image = calibrate(official, num_bytes, mean_pixels, args.steps)
        machine = Machine(
            image / hardware.get("times", 1),
            **{key: value for key, value in hardware.items() if key != "times"},
        )
        steps = {n: simulate(sizes, machine, n, num_bytes, mean_pixels, args.steps) for n in GPUS}
        result["cases"][name] = {n: vars(step) for n, step in steps.items()}
        alone = steps[1].total
        print(f"{name}: 1 GPU {1000 * alone:.0f} ms")
        for n in (8, 64, 1024):
            s = steps[n]
            parts = (s.compute, s.waiting, s.exchange, s.loading)
            shown = ", ".join(f"{1000 * part:.0f}" for part in parts)
            print(f"  {n:5} GPUs {1000 * s.total:6.0f} ms ({shown}), {alone / s.total:.0%}")
    print(
        f"{num_bytes / 1e6:.0f} MB of gradients; an image of the mean size, {mean_pixels:.0f} "
        f"pixels, takes {1000 * image:.0f} ms"
    )
    return result


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw which share of the ideal rate is reached."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(result["cases"])
    for number, i in enumerate(DRAWN):
        steps = result["cases"][names[i]]
        shares = [steps[1]["total"] / steps[n]["total"] for n in GPUS]
        axes.plot(GPUS, shares, label=names[i], linestyle="-" if number < 3 else "--", marker="o",
                  markersize=3)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(n) for n in GPUS])
    axes.set(xlabel="GPUs", ylabel="rate of a GPU, of that of one alone", ylim=(0, 1.05))
    axes.grid(color="#d9dce1", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def check(args: argparse.Namespace) -> None:
    """Print measured and predicted seconds of real processes."""
    draw = np.random.default_rng(0)
    sides = draw.choice([480, 512, 576, 608, 640, 672, 704, 736, 768, 800], (args.steps, 8, 2, 1))
    sides = sides * np.array([1.0, 4 / 3])
    pixels = 2 * sides.max(axis=2).prod(axis=2)  # [steps,8]
    seconds = pixels / pixels.mean() * args.wait
    for processes in args.processes:
        mine = seconds[:, :processes]
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager:
            found = manager.list()
            children = [
                context.Process(
                    target=_process, args=(rank, processes, mine, args.megabytes, found)
                )
                for rank in range(processes)
            ]
            for child in children:
                child.start()
            for child in children:
                child.join()
            exchange, step, sent = found[0]
        predicted = mine.max(axis=1).mean() + exchange
        least = 2 * (processes - 1) * args.megabytes
        print(
            f"{processes} processes: step {1000 * step:.0f} ms, predicted {1000 * predicted:.0f} "
            f"({step / predicted:.2f}): slowest {1000 * mine.max(axis=1).mean():.0f} of mean "
            f"{1000 * mine.mean():.0f}, all-reduce {1000 * exchange:.0f}; "
            f"{sent / 1e6:.0f} MB sent, a ring's {least:.0f}",
            flush=True,
        )


def _process(rank: int, size: int, seconds: Floats, megabytes: float, found: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_PORT)}
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    gradients = torch.ones(int(megabytes * 1e6 / 4))
    alone = []
    for _ in range(9):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(gradients)
        alone.append(time.perf_counter() - started)
        gradients.fill_(1.0)
    distributed.barrier()
    before, started = _sent(), time.perf_counter()
    for wait in seconds[:, rank]:
        time.sleep(wait)
        distributed.all_reduce(gradients)
        gradients.fill_(1.0)
    distributed.barrier()
    steps = len(seconds)
    step, sent = (time.perf_counter() - started) / steps, (_sent() - before) / steps
    if rank == 0:
        found.append((statistics.median(alone[1:]), step, sent))
    distributed.destroy_process_group()


def _sent() -> int:
    """Return the bytes that this machine has sent to itself."""
    lines: Iterator[str] = iter(Path("/proc/net/dev").read_text().splitlines())
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/deformable_detr_r50.yaml")
    parser.add_argument("--coco_path", default="../shared/datasets/coco_by")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", type=Path, help="draw the rates, as SVG or PNG")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--check", action="store_true", help="run real processes instead")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2, 3, 8))
    parser.add_argument("--wait", type=float, default=0.4, help="mean seconds in place of a GPU's")
    parser.add_argument("--megabytes", type=float, default=20.0, help="of the check's gradients")
    args = parser.parse_args()
    if args.check:
        check(args)
        return
    result = tables(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
