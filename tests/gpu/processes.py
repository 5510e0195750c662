"""Distributed training as far as one GPU goes: NCCL alone, and two processes over gloo.

Gradients of one update are compared with those of a single process without any wrapper.
"""

import argparse
import math
import os
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import LossConfig, ModelConfig
from engine.optim import Precision
from models.build import build_criterion, build_model
from tests.gpu.results import emit
from tests.gpu.step_times import CLASSES, SMALL, make_batch

IMAGES = 2
TOLERANCE = 1e-4  # relative; float32, sums in another order


def gradients(device: torch.device, images: slice, *, wrapped: bool) -> dict[str, Tensor]:
    """Return the gradients of one update from some of the images."""
    Precision("fp32", device)  # else a GPU may round products to TF32, more than is tolerated
    torch.manual_seed(0)
    config = ModelConfig(**SMALL.model, dropout=0.0)
    model = build_model(config, num_classes=CLASSES).to(device).train()
    trained: nn.Module = DistributedDataParallel(model) if wrapped else model
    batch, targets = make_batch(SMALL, IMAGES, device)
    own = make_batch(SMALL, len(targets[images]), device)[0]
    own.images.copy_(batch.images[images])
    boxes = sum(len(t["labels"]) for t in targets)
    processes = dist.get_world_size() if wrapped else 1
    criterion = build_criterion(LossConfig())
    losses = criterion(trained(own, targets[images]), targets[images], boxes / processes)
    torch.autograd.backward(losses["loss"])
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all gradients, relative to theirs."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[n] - e).double().square().sum()) for n, e in expected.items())
    return math.sqrt(difference / sum(float(e.double().square().sum()) for e in expected.values()))


def work(rank: int, size: int, backend: str, device_name: str, port: int, folder: str) -> None:
    """Be one process of a group; leave the gradients in the folder."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= address
    dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        each = IMAGES // size
        own = slice(rank * each, (rank + 1) * each)
        found = gradients(torch.device(device_name), own, wrapped=True)
        torch.save(found, Path(folder) / f"{backend}_{size}_{rank}.pth")
    finally:
        dist.destroy_process_group()


def compare(size: int, backend: str, device: str, expected: dict[str, Tensor]) -> bool:
    """Run a group of processes and compare; emit what came of it."""
    found: dict[str, Any]
    with socket.socket() as probe, TemporaryDirectory() as folder:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        try:
            multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
                work, (size, backend, device, port, folder), nprocs=size
            )
            errors = [
                error(torch.load(file, weights_only=True), expected)
                for file in sorted(Path(folder).iterdir())
            ]
            found = {"relative_error": max(errors), "passed": max(errors) < TOLERANCE}
        except Exception as failure:  # the other group must still be tried
            found = {"error": f"{type(failure).__name__}: {str(failure)[-300:]}", "passed": False}
    emit("processes", backend=backend, processes=size, device=device, **found)
    return bool(found["passed"])


def main() -> int:
    """Run the command line; return 1 where gradients differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    device, backend = "cuda:0", "nccl"
    if parser.parse_args().dry:
        device, backend = "cpu", "gloo"
    expected = gradients(torch.device(device), slice(None), wrapped=False)
    passed = [compare(1, backend, device, expected), compare(2, "gloo", device, expected)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
