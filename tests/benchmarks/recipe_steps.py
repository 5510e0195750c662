"""Time the training step of a preset with several sets of switches, by turns, and their memory.

    python -m tests.benchmarks.recipe_steps --config finetune_small --memory \
        "" "--num_denoising 50" "--mixed_query_selection --look_forward_twice"

Each set of switches is what one would add to the command line of `train`; an empty one is the
preset alone, and the first is what the others are compared with. A step is forward, matching,
losses, backward and fused AdamW on random images of the preset's evaluation size, 4:3, with
`--boxes` boxes each. All take turns in one process. With `--memory`, the peak of each is measured
in a process of its own, with weights, gradients and moments (Linux).
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from configs.command_line import OptionParser, read_command_line
from configs.schema import Config
from engine.commands import train
from models.build import build_criterion, build_model
from util.batch import Target, pad_images

CLASSES = 3


def config_of(preset: str, switches: str) -> Config:
    """Return the options of a run."""
    words = ["--config", preset, *switches.split()]
    return read_command_line(OptionParser(), train, words).config()


def contender(config: Config, boxes: int) -> Callable[[], None]:
    """Return a training step of a fresh model. It learns nothing: its learning rate is 0."""
    torch.manual_seed(0)
    model = build_model(
        config.model,
        num_classes=CLASSES,
        frozen_stages=config.optim.frozen_stages,
        recipes=config.recipes,
    ).train()
    criterion = build_criterion(config.loss)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.0, fused=True)
    side = config.data.eval_scale
    images = pad_images(
        [torch.randn(3, side, round(side * 4 / 3)) for _ in range(config.optim.batch_size)]
    )
    targets: list[Target] = [
        {
            "labels": torch.randint(0, CLASSES, (boxes,)),
            "boxes": torch.rand(boxes, 4) * 0.3 + 0.2,
            "image_id": torch.tensor(image),
        }
        for image in range(config.optim.batch_size)
    ]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = criterion(model(images, targets), targets)
        torch.autograd.backward(losses["loss"])
        optimizer.step()

    return step


def peak_of(preset: str, switches: str, boxes: int) -> float:
    """Return the peak memory in GiB of a process that runs two steps."""
    command = [sys.executable, "-m", "tests.benchmarks.recipe_steps", "--config", preset]
    command += ["--boxes", str(boxes), "--one", switches]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.split()[-1]) / 2**30


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("switches", nargs="*", default=[""], help="options added to the preset")
    parser.add_argument("--config", default="finetune_small", help="preset")
    parser.add_argument("--boxes", type=int, default=12, help="in each image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        step = contender(config_of(options.config, options.switches[0]), options.boxes)
        step()
        step()
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
        return
    steps = [contender(config_of(options.config, s), options.boxes) for s in options.switches]
    seconds: list[list[float]] = [[] for _ in steps]
    for round_number in range(options.rounds + 1):
        for step, values in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if round_number:  # the first warms up
                values.append(time.perf_counter() - start)
    first = statistics.median(seconds[0])
    print(f"{options.config}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    for switches, values in zip(options.switches, seconds, strict=True):
        middle = statistics.median(values)
        memory = ""
        if options.memory:
            memory = f", peak {peak_of(options.config, switches, options.boxes):.2f} GiB"
        print(
            f"{middle:6.3f} s ({min(values):.3f} to {max(values):.3f}), {middle / first:.2f} times "
            f"the first{memory}: {switches or '(nothing added)'}"
        )


if __name__ == "__main__":
    main()
