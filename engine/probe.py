"""The largest step of a run, tried before the first: does it fit into memory?"""

import os
import re
import sys
import time
from pathlib import Path

import torch

from datasets.dataset import CocoDetection
from engine.trainer import Trainer
from util.batch import Batch, pad_images
from util.console import log
from util.random_state import random_state_kept

_GIB = 2**30


def try_largest_step(trainer: Trainer, dataset: CocoDetection, batch_size: int) -> None:
    """Run one step of the largest shape with the most boxes, which changes nothing; report it.

    Raises:
        UserError: it does not fit into memory.
    """
    sizes = [dataset.transform.largest_size(*size) for size in dataset.image_sizes() if all(size)]
    if not sizes:
        return
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if batch_size == 1:
        height, width = max(sizes, key=lambda size: size[0] * size[1])
    num_boxes = int(dataset.index.boxes_per_image.max(initial=0))
    device = trainer.device
    with random_state_kept():
        batch = random_batch(batch_size, (height, width), num_boxes)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        try_step(trainer, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    trained = (p for p in trainer.detector.parameters() if p.requires_grad)
    later = sum(2 * p.nbytes for p in trained)  # AdamW's moments
    peak, total = peak_memory(device), total_memory(device)
    log.info(
        f"largest step: {batch_size} x {height} x {width}, {num_boxes} boxes: "
        f"peak {(peak + later if peak else 0) / _GIB:.1f} GiB"
        f"{f' of {total / _GIB:.1f} GiB' if total else ''}, {seconds:.1f} s"
    )


def try_step(trainer: Trainer, batch: Batch) -> None:
    """Run forward and backward of a micro-batch, and undo what they change.

    Raises:
        UserError: it does not fit into memory.
    """
    assert batch.images is not None
    model = trainer.detector.train()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with trainer.guards.watch(trainer.step, [batch]):
            with trainer.precision.autocast():
                outputs = model(batch.images.to(trainer.device), batch.targets)
            losses = trainer.criterion(outputs, batch.targets)
            torch.autograd.backward(trainer.precision.scaler.scale(losses["loss"]))
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def random_batch(batch_size: int, shape: tuple[int, int], num_boxes: int) -> Batch:
    """Return noise of `shape` (height, width) without padding; boxes of class 0 inside."""
    images = pad_images([torch.randn(3, *shape) for _ in range(batch_size)])
    sides = torch.rand(batch_size, num_boxes, 2) * 0.45 + 0.05
    centres = sides / 2 + torch.rand(batch_size, num_boxes, 2) * (1 - sides)
    targets = [
        {
            "image_id": torch.tensor(number),
            "labels": torch.zeros(num_boxes, dtype=torch.int64),
            "boxes": boxes,
            "orig_size": torch.tensor(shape),
            "size": torch.tensor(shape),
        }
        for number, boxes in enumerate(torch.cat([centres, sides], dim=2))
    ]
    return Batch(images, targets, [])


def peak_memory(device: torch.device) -> int:
    """Return the peak of bytes held by tensors on a GPU, else by this process; 0: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    if found := re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory(device: torch.device) -> int:
    """Return the bytes of the GPU, else of this machine or container; 0 where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32":
        return 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.exists() else ""
    return min(total, int(words)) if words.isdecimal() else total
