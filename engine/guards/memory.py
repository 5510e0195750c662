"""Memory: the peak of the largest step, and what to do when a step does not fit."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.guards.guard import Guard
from util.batch import Batch, PaddedBatch, Target, pad_images
from util.errors import UserError
from util.random_state import random_state_kept

_GIB = 2**30
_MESSAGES = ("defaultcpuallocator", "out of memory", "alloc_failed")


class MemoryGuard(Guard):
    """Turns a step that does not fit into memory into advice."""

    def __init__(self, accumulation: int) -> None:
        """`accumulation`: micro-batches of a step in this process."""
        self._accumulation = accumulation

    def on_error(
        self, error: RuntimeError | MemoryError, micro_batches: Sequence[Batch]
    ) -> UserError | None:
        if not out_of_memory(error):
            return None
        shapes = [tuple(b.images.images.shape) for b in micro_batches if b.images is not None]
        return memory_advice(
            error,
            images_shape=max(shapes, key=lambda s: s[2] * s[3]),
            boxes=max(len(t["labels"]) for batch in micro_batches for t in batch.targets),
            micro_batch=max(shape[0] for shape in shapes),
            accumulation=self._accumulation,
        )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _MESSAGES)


def memory_advice(
    error: BaseException,
    *,
    images_shape: tuple[int, ...],
    boxes: int,
    micro_batch: int,
    accumulation: int,
) -> UserError:
    """Return the error that says what did not fit and which options help.

    `images_shape` is that of the padded micro-batch, [N,3,H,W]; `boxes` the most of an image.
    """
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    more = ""
    if asked:
        size, unit = asked.groups()
        more = f" ({float(size) / _GIB:.1f} GiB" if unit == "bytes" else f" ({size} {unit}"
        more += " more were needed)"
    smaller = "`activation_checkpointing`, `precision bf16`"
    if micro_batch > 1:
        smaller = (
            f"`batch_size {micro_batch // 2}` with the same `effective_batch_size` (now "
            f"{micro_batch} x {accumulation} in a process; the result is the same), {smaller}"
        )
    images = " x ".join(str(n) for n in (images_shape[0], *images_shape[-2:]))
    return UserError(
        f"training step: out of memory on {images} pixels with up to {boxes} boxes an image"
        f"{more}. Try {smaller}, or smaller images (`train_scales`, `max_size`)."
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak of bytes held by tensors on a GPU, else by this process; 0: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
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


@dataclass(frozen=True)
class Probe:
    """What the largest step takes: bytes at its peak and in all, seconds."""

    batch_size: int
    shape: tuple[int, int]
    num_boxes: int
    peak: int
    total: int
    seconds: float

    def line(self) -> str:
        """Return it in words, for the console."""
        height, width = self.shape
        whole = f" of {self.total / _GIB:.1f} GiB" if self.total else ""
        return (
            f"largest step: {self.batch_size} x {height} x {width}, {self.num_boxes} boxes: "
            f"peak {self.peak / _GIB:.1f} GiB{whole}, {self.seconds:.1f} s"
        )


def probe(
    step: Callable[[PaddedBatch, list[Target]], None],
    device: torch.device,
    shape: tuple[int, int],
    num_boxes: int,
    batch_size: int,
    later: int = 0,
) -> Probe:
    """Run `step`, forward and backward, on random images of `shape` with `num_boxes` boxes each.

    `later` are bytes that training will hold as well, such as the optimiser's. Images are on the
    device, targets on the host. The random generators are restored; `step`
    clears its gradients and restores what else it changes. What it raises passes through.
    """
    with random_state_kept():
        images, targets = _random_batch(shape, num_boxes, batch_size)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        step(images.to(device), targets)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    peak = peak_memory(device)
    whole = peak + later if peak else 0
    return Probe(batch_size, shape, num_boxes, whole, total_memory(device), seconds)


def _random_batch(
    shape: tuple[int, int], num_boxes: int, batch_size: int
) -> tuple[PaddedBatch, list[Target]]:
    """Return noise without padding; boxes of class 0 within the image."""
    images = pad_images([torch.randn(3, *shape) for _ in range(batch_size)])
    size = torch.tensor(shape)
    targets = []
    for number in range(batch_size):
        sides = torch.rand(num_boxes, 2) * 0.45 + 0.05
        centres = sides / 2 + torch.rand(num_boxes, 2) * (1 - sides)
        targets.append(
            {
                "image_id": torch.tensor(number),
                "labels": torch.zeros(num_boxes, dtype=torch.int64),
                "boxes": torch.cat([centres, sides], dim=1),
                "orig_size": size,
                "size": size,
            }
        )
    return images, targets
