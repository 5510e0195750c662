"""Time a training step of a preset with each backend of the attention op, in turns.

python -m tests.benchmarks.training_step --config configs/deformable_detr_r50.yaml --size 800 1066
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from configs.schema import build_config, load_layers
from models.build import build_criterion, build_model
from models.criterion import SetCriterion
from ops import use_backend
from util.batch import PaddedBatch, Target, pad_images

_CLASSES, _OBJECTS = 91, 7  # of COCO; a usual picture


def make_batch(count: int, height: int, width: int) -> tuple[PaddedBatch, list[Target]]:
    """Return random pictures with random boxes."""
    images = pad_images([torch.randn(3, height, width) for _ in range(count)])
    targets: list[Target] = [
        {
            "labels": torch.randint(0, _CLASSES, (_OBJECTS,)),
            "boxes": torch.rand(_OBJECTS, 4) * 0.3 + 0.2,
        }
        for _ in range(count)
    ]
    return images, targets


def step(
    model: nn.Module,
    criterion: SetCriterion,
    optimizer: torch.optim.Optimizer,
    images: PaddedBatch,
    targets: list[Target],
) -> float:
    """Run one step; return its seconds."""
    start = time.perf_counter()
    losses = criterion(model(images), targets)
    total: Tensor = torch.stack(
        [loss * (criterion.weight(name) or 0.0) for name, loss in losses.items()]
    ).sum()
    optimizer.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/deformable_detr_r50.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1066], help="height, width")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["reference", "cpu"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = build_config(load_layers(options.config, {}))
    model = build_model(config.model, num_classes=_CLASSES).train()
    criterion = build_criterion(config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    images, targets = make_batch(options.batch_size, *options.size)
    times: dict[str, list[float]] = {name: [] for name in options.backends}
    for round_number in range(options.rounds + 1):
        for name in options.backends:
            with use_backend(name):
                seconds = step(model, criterion, optimizer, images, targets)
            if round_number:  # the first warms up
                times[name].append(seconds)
    first = statistics.median(times[options.backends[0]])
    for name, seconds_of in times.items():
        median = statistics.median(seconds_of)
        print(f"{name:10s} {median:7.2f} s a step  {first / median:5.2f}x")


if __name__ == "__main__":
    main()
