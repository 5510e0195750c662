"""Memory: what to do when a step does not fit."""

import re
from collections.abc import Sequence

import torch

from engine.guards.guard import Guard
from util.batch import Batch
from util.errors import UserError

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
        asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
        more = ""
        if asked:
            size, unit = asked.groups()
            more = f" ({float(size) / _GIB:.1f} GiB" if unit == "bytes" else f" ({size} {unit}"
            more += " more were needed)"
        shapes = [tuple(b.images.images.shape) for b in micro_batches if b.images is not None]
        micro_batch = max(shape[0] for shape in shapes)
        smaller = "`activation_checkpointing`, `precision bf16`"
        if micro_batch > 1:
            smaller = (
                f"`batch_size {micro_batch // 2}` with the same `effective_batch_size` (now "
                f"{micro_batch} x {self._accumulation} in a process; the result is the same), "
                f"{smaller}"
            )
        number, _, height, width = max(shapes, key=lambda s: s[2] * s[3])
        boxes = max(len(t["labels"]) for batch in micro_batches for t in batch.targets)
        return UserError(
            f"training step: out of memory on {number} x {height} x {width} pixels with up to "
            f"{boxes} boxes an image{more}. Try {smaller}, or smaller images (`train_scales`, "
            "`max_size`)."
        )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _MESSAGES)
