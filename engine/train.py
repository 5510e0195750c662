"""Training steps: one update each, on an effective batch shared out among processes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from engine.ema import Ema
from engine.guards.memory import memory_advice, out_of_memory
from engine.guards.nonfinite import first_nonfinite
from engine.metrics import StepLog, StepRecord
from engine.precision import Precision
from models.criterion import SetCriterion
from util.batch import Batch, PaddedBatch, Target, UnreadableImage, pad_images
from util.console import console
from util.distributed import World
from util.errors import UserError

_BLANK_SIDE = 64  # pixels of the image that stands in where a process has none


class UnreadableImages:
    """Names each image that cannot be read once, and keeps them by path."""

    def __init__(self) -> None:
        self.images: dict[str, UnreadableImage] = {}

    def report(self, batch: Batch) -> None:
        """Print the batch's unreadable images that were not printed before."""
        for image in batch.unreadable:
            if image.path not in self.images:
                self.images[image.path] = image
                console(
                    f"warning: image {image.image_id} '{image.path}' cannot be read "
                    f"({image.reason}); going on without it.",
                    every_rank=True,
                )


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield lists of `size` batches."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


class Uploads:
    """Copies batches to a GPU beside what it computes; elsewhere they stay as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, images: PaddedBatch) -> PaddedBatch:
        """Begin to copy; the result may be used after `wait`."""
        if self._stream is None:
            return images.to(self._device)
        with torch.cuda.stream(self._stream):
            return images.to(self._device)

    def wait(self, images: PaddedBatch) -> PaddedBatch:
        """Let the computation wait for the copies so far."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (images.images, images.mask):
                tensor.record_stream(current)
        return images


@dataclass
class StepRunner:
    """Runs steps. `model` is what is saved, `trained` the same one or its distributed wrapper.

    The losses of each micro-batch are divided by the boxes of the whole effective batch, so that
    gradients do not depend on how it is shared out. A step whose gradient is not finite changes
    no weights.
    """

    model: nn.Module
    trained: nn.Module
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    device: torch.device
    steps: StepLog
    precision: Precision
    clip_max_norm: float
    accumulation: int = 1
    world: World = field(default_factory=World)
    ema: Ema | None = None
    flush_every: int = 10
    step: int = 0
    unreadable: UnreadableImages = field(default_factory=UnreadableImages)

    def __post_init__(self) -> None:
        self._uploads = Uploads(self.device)
        self._norms = [
            m for m in self.model.modules()
            if isinstance(m, nn.BatchNorm2d) and m.affine and m.weight.requires_grad
        ]  # fmt: skip

    def run(
        self,
        batches: Iterable[Batch],
        *,
        epoch: int,
        stopping: Callable[[], bool],
        on_step: Callable[[Mapping[str, float] | None], bool],
    ) -> None:
        """Train on all micro-batches of an epoch.

        Ends before the next step when `stopping()` holds in any process, and after a step for
        which `on_step` returns True; `on_step` gets the latest values whenever some were logged.
        """
        self.model.train()
        timer = self.steps.timer
        timer.restart()
        for group in grouped(batches, self.accumulation):
            for batch in group:
                self.unreadable.report(batch)
            boxes, images, stop = self.world.sum(
                [
                    sum(len(t["labels"]) for batch in group for t in batch.targets),
                    sum(len(batch.targets) for batch in group),
                    float(stopping()),
                ]
            )
            if stop:
                break
            timer.mark("data")
            if images:
                self._guarded_step(group, max(boxes, 1.0) / self.world.size, epoch)
            self.step += 1
            flushing = self.step % self.flush_every == 0
            if on_step(self.steps.flush(keep=1) if flushing else None):
                break
            timer.restart()  # logging and saving are no part of a step
        self.steps.flush()

    def _guarded_step(self, group: Sequence[Batch], num_boxes: float, epoch: int) -> None:
        try:
            self._step(group, num_boxes, epoch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise self._memory_error(error, group) from error

    def _memory_error(self, error: BaseException, group: Sequence[Batch]) -> UserError:
        shapes = [tuple(b.images.images.shape) for b in group if b.images is not None]
        return memory_advice(
            error,
            images_shape=max(shapes, key=lambda s: s[2] * s[3]),
            boxes=max(len(t["labels"]) for batch in group for t in batch.targets),
            micro_batch=max(shape[0] for shape in shapes),
            accumulation=self.accumulation,
        )

    def _step(self, group: Sequence[Batch], num_boxes: float, epoch: int) -> None:
        """Forward and backward of every micro-batch, then the update."""
        self.optimizer.zero_grad(set_to_none=True)
        # without an image a process still answers the others' exchange of gradients
        used = [b for b in group if b.images is not None or self.world.size > 1]
        following = self._uploads.start(inputs_of(used[0])[0])
        total, module = None, ""
        for i, batch in enumerate(used):
            images = self._uploads.wait(following)
            if i + 1 < len(used):
                following = self._uploads.start(inputs_of(used[i + 1])[0])
            shares = num_boxes if batch.targets else float("inf")  # a blank image counts nothing
            with self._exchange(last=i + 1 == len(used)):
                losses, where = self.backward(images, inputs_of(batch)[1], shares)
            module = module or where
            values = torch.stack([v.detach().float() for v in losses.values()])
            total = values if total is None else total + values
        assert total is not None
        norm = self._update()
        self.steps.timer.mark("optimiser")
        self.steps.timer.finish_step()
        self.steps.add(
            StepRecord(
                step=self.step,
                epoch=epoch,
                names=[*losses, "grad_norm"],
                values=torch.cat([total, norm.float()[None]]).to("cpu", non_blocking=True),
                image_ids=[int(t["image_id"]) for batch in used for t in batch.targets],
                rates={f"lr_{g['name']}": g["lr"] for g in self.optimizer.param_groups},
                module=module,
            )
        )
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.model)

    def _exchange(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let gradients be exchanged in a step's last backward alone."""
        if last or self.world.size == 1:
            return contextlib.nullcontext()
        no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = self.trained.no_sync  # type: ignore[assignment]
        return no_sync()

    def backward(
        self,
        images: PaddedBatch,
        targets: Sequence[Target],
        num_boxes: float,
        model: nn.Module | None = None,
    ) -> tuple[dict[str, Tensor], str]:
        """Add a micro-batch's gradients; return its losses and the module that was not finite.

        Outputs that are not finite make the loss NaN, and the exchanged gradients with it, so that
        every process skips the step.
        """
        timer, where = self.steps.timer, ""
        statistics = [(b, b.clone()) for m in self._norms for b in m.buffers()]
        with self.precision.autocast():
            outputs = (model or self.trained)(images, targets)
        timer.mark("forward")
        losses = self.criterion(outputs, targets, num_boxes)
        timer.mark("match")
        if not losses["loss"].isfinite():
            with self.precision.autocast():
                where = first_nonfinite(self.model, images)
        self.precision.scale(losses["loss"]).backward()  # type: ignore[no-untyped-call]
        if where:  # the batch has spoilt them; the backward pass needed them as they were
            with torch.no_grad():
                for buffer, before in statistics:
                    buffer.copy_(before)
        timer.mark("backward")
        return losses, where

    def probe(self, images: PaddedBatch, targets: Sequence[Target]) -> None:
        """Run forward and backward of a micro-batch, and forget the gradients."""
        try:
            self.backward(images.to(self.device), targets, 1.0, self.model)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise self._memory_error(error, [Batch(images, list(targets), [])]) from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _update(self) -> Tensor:
        """Clip and step; return the norm of the gradient before."""
        self.precision.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            (p for g in self.optimizer.param_groups for p in g["params"]),
            self.clip_max_norm if self.clip_max_norm > 0 else float("inf"),
        )
        self.precision.step(self.optimizer, norm)
        return norm.detach()


def inputs_of(batch: Batch) -> tuple[PaddedBatch, Sequence[Target]]:
    """Return a batch's images and targets, or a blank image where none could be read."""
    if batch.images is not None:
        return batch.images, batch.targets
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return pad_images([torch.zeros(3, _BLANK_SIDE, _BLANK_SIDE)]), [empty]


def diverged(place: str, reason: str) -> UserError:
    """Return the error of a run whose numbers are no longer finite."""
    return UserError(
        f"{place}: {reason}. The run diverged or the data is not finite: resume from last.pth "
        "with a lower --lr, or start anew with --warmup_steps."
    )
