"""What a guard is, something that watches the steps of a run from outside; the two short ones."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from util.batch import Batch, UnreadableImage
from util.console import log
from util.errors import UserError

_GIB = 2**30
_OUT_OF_MEMORY = ("defaultcpuallocator", "out of memory", "alloc_failed")


@dataclass(frozen=True)
class LoggedStep:
    """A step as it is logged: values on the host, means over all processes.

    `values` have the official names; `image_ids` are this process's; `rates` the learning rates
    of the step.
    """

    step: int
    epoch: int
    image_ids: Sequence[int]
    values: Mapping[str, float]
    rates: Mapping[str, float]

    @property
    def finite(self) -> bool:
        """Return whether the step changed the weights."""
        return math.isfinite(self.values["loss"] + self.values["grad_norm"])


class Guard:
    """Does nothing; a guard overrides what it needs."""

    def before_step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """See the micro-batches of this process before the step."""

    def after_step(
        self, step: int, micro_batches: Sequence[Batch], metrics: Mapping[str, Tensor]
    ) -> None:
        """See the step's losses and gradient norm, on the device, right after the step."""

    def on_error(
        self, error: RuntimeError | MemoryError, micro_batches: Sequence[Batch]
    ) -> UserError | None:
        """Return what the user can do about an error of the step, None where that is unknown."""

    def on_log(self, step: LoggedStep) -> None:
        """See a step when it is logged, some steps later."""


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
        more = ""
        if asked := re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE):
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
    return isinstance(error, RuntimeError) and any(message in text for message in _OUT_OF_MEMORY)


class UnreadableImages(Guard):
    """Names each image that cannot be read once, and keeps them by path."""

    def __init__(self) -> None:
        self.images: dict[str, UnreadableImage] = {}

    def before_step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        for batch in micro_batches:
            self.report(batch)

    def report(self, batch: Batch) -> None:
        """Print the batch's unreadable images that were not printed before."""
        for image in batch.unreadable:
            if image.path not in self.images:
                self.images[image.path] = image
                log.warning(
                    f"image {image.image_id} '{image.path}' cannot be read ({image.reason}) and "
                    "is skipped."
                )
