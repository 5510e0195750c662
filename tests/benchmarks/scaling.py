"""Time and memory of a training step as images, boxes, queries and processes grow.

    python -m tests.benchmarks.scaling --output docs/scaling.json

Every setting runs in fresh processes on random images, so that its peak memory is measured alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from configs.load import read_options
from datasets.build import split_batch
from datasets.dataset import CocoDetection
from datasets.loader import TrainLoader
from engine.build import assemble_trainer
from engine.checkpoint import CheckpointFolder
from engine.probe import peak_memory
from engine.run_log import RunLog
from models.build import build_model
from util.batch import Batch, EffectiveBatch, Target, pad_images
from util.device import pick_device
from util.distributed import destroy_process_group, init_process_group
from util.random_state import seed_everything

SETTINGS: dict[str, list[dict[str, int]]] = {
    "images per batch": [{"images": n} for n in (1, 2, 4)],
    "boxes per image": [{"boxes": n} for n in (1, 30, 100, 300)],
    "queries": [{"queries": n, "boxes": 30} for n in (100, 300, 900)],
    "processes, 4 images in total": [{"images": 4 // n, "processes": n} for n in (1, 2)],
}
_PORT = 29517


def make_batch(images: int, boxes: int, height: int, width: int, classes: int) -> Batch:
    """Return random images of one size, each with `boxes` boxes."""
    targets: list[Target] = []
    for number in range(images):
        sides = 0.05 + 0.3 * torch.rand(boxes, 2)
        centres = sides / 2 + torch.rand(boxes, 2) * (1 - sides)
        size = torch.tensor([height, width])
        targets.append(
            {
                "image_id": torch.tensor(number),
                "labels": torch.randint(classes, (boxes,)),
                "boxes": torch.cat([centres, sides], dim=1),
                "orig_size": size,
                "size": size,
            }
        )
    batch = pad_images([torch.randn(3, height, width) for _ in range(images)])
    return Batch(batch, targets, [])


class Steps(TrainLoader):
    """The same batch for every step."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self._batch, self.steps, self.accumulation = batch, steps, 1

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Do nothing: there is one order."""

    def effective_batches(self) -> Iterator[list[Batch]]:
        """Yield the batch for each step."""
        return repeat([self._batch], self.steps)


def run_setting(options: argparse.Namespace) -> None:
    """Train a few steps in this process; the main one prints seconds and bytes."""
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    world = init_process_group(device.type)
    seed_everything(0)
    given = {"model": {"num_queries": options.queries}, "run": {"output_dir": options.folder}}
    config = read_options(options.config, given).config()
    model = build_model(config.model, num_classes=91).to(device)
    share = split_batch(0, max_size=options.images, rank=world.rank, world_size=world.size)
    optim = replace(config.optim, effective_batch_size=share.effective, precision=options.precision)
    config = replace(config, optim=optim)
    height, width = options.size
    batch = make_batch(options.images, options.boxes, height, width, 91)
    seconds: list[float] = []
    with RunLog(Path(options.folder), enabled=world.main) as log:
        trainer = assemble_trainer(
            config,
            model,
            Steps(batch, options.steps + 1),  # the first one warms up
            cast(CocoDetection, None),
            [],
            world=world,
            device=device,
            run_log=log,
            folder=CheckpointFolder(Path(options.folder), keep=1),
            identity={},
        )
        train_step = trainer.train_step

        def timed(micro_batches: Sequence[Batch], whole: EffectiveBatch) -> dict[str, Tensor]:
            started = time.perf_counter()
            metrics = train_step(micro_batches, whole)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            return metrics

        trainer.train_step = timed  # type: ignore[method-assign]
        with tqdm(disable=True) as bar:
            trainer.train_epoch(bar)
    if world.main:
        found = {"seconds": statistics.median(seconds[1:]), "bytes": peak_memory(device)}
        print(json.dumps(found))
    destroy_process_group()


def measure(setting: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Run a setting in fresh processes; return the results of the main one."""
    processes = setting.get("processes", 1)
    chosen = {"images": 1, "boxes": 10, "queries": 300, **setting}
    children = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(processes):
            command = [
                sys.executable, "-m", "tests.benchmarks.scaling", "--child", "--folder", folder,
                "--config", options.config, "--device", options.device,
                "--precision", options.precision, "--steps", str(options.steps),
                "--size", *map(str, options.size),
                "--threads", str(max(1, options.threads // processes)),
                *(w for n in ("images", "boxes", "queries") for w in (f"--{n}", str(chosen[n]))),
            ]  # fmt: skip
            group = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_PORT),
            }  # fmt: skip
            env = {**os.environ, **(group if processes > 1 else {})}
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        printed = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{chosen}: failed")
    return {**chosen, "processes": processes, **json.loads(printed[0].splitlines()[-1])}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/deformable_detr_r50.yaml")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 427))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    for name in ("images", "boxes", "queries"):
        parser.add_argument(f"--{name}", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_setting(options)
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for title, settings in SETTINGS.items():
        print(title)
        for setting in settings:
            found = measure(setting, options)
            results.setdefault(title, []).append(found)
            shown = ", ".join(f"{name} {value}" for name, value in setting.items())
            print(f"  {shown:28s} {found['seconds']:7.2f} s  {found['bytes'] / 2**30:5.2f} GiB")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
