"""Inference over a data set, and its COCO evaluation."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from datasets.tiles import Tiling
from engine.averages import Averages, official_log_values
from engine.evaluation.evaluator import EvalResult, Evaluator
from engine.evaluation.tiling import by_image
from engine.guards.guard import UnreadableImages
from models.criterion import SetCriterion
from models.postprocess import PostProcess
from models.queries import DetectorOutput
from util.batch import Batch, PaddedBatch, Target, pad_images
from util.errors import DataError, UserError
from util.progress import progress
from util.world import World

T = TypeVar("T")
_ASK_EVERY = 2.0  # seconds between exchanges on whether to stop


@torch.inference_mode()
def detect(
    model: nn.Module,
    postprocess: PostProcess,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    description: str | None,
    skip_unreadable: bool = True,
    on_outputs: Callable[[DetectorOutput, Sequence[Target]], object] | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[Batch, list[dict[str, Tensor]]]]:
    """Yield every batch with its detections (pixels of the original images, on the host).

    Unreadable images are skipped and reported, or else an error; a batch of nothing else has no
    detections. Images of different sizes go through the model one by one, so that none sees
    padding. `on_outputs` sees the raw outputs. With a `description`, a progress bar is shown.

    Raises:
        DataError: an image cannot be read, unless those are skipped.
        UserError: a score or box is not finite.
    """
    model.eval()
    unreadable = UnreadableImages()
    enabled = description is not None
    for batch in progress(batches, unit="batch", description=description or "", enabled=enabled):
        if batch.unreadable and not skip_unreadable:
            image = batch.unreadable[0]
            name = image.path or f"image {image.image_id}"
            raise DataError(f"{name}: cannot be read ({image.reason}). Check the file.")
        unreadable.report(batch)
        if batch.images is None:
            yield batch, []
            continue
        found: list[dict[str, Tensor]] = []
        for images, targets in unpadded_parts(batch.images, batch.targets):
            with autocast():
                outputs = model(images.to(device))
            if on_outputs is not None:
                on_outputs(outputs, targets)
            sizes = torch.stack([t["orig_size"] for t in targets]).to(device)
            found += postprocess(outputs, sizes)
        on_host = [{k: v.cpu() for k, v in d.items()} for d in found]
        for output, target in zip(on_host, batch.targets, strict=True):
            if not (output["scores"].isfinite().all() and output["boxes"].isfinite().all()):
                raise UserError(
                    f"image {int(target['image_id'])}: the model produced NaN or infinite scores "
                    "or boxes: its weights are corrupt, or the precision is too low. Use another "
                    "checkpoint or precision."
                )
        yield batch, on_host


def unpadded_parts(
    images: PaddedBatch, targets: Sequence[Target]
) -> list[tuple[PaddedBatch, Sequence[Target]]]:
    """Return a batch whole where nothing is padded, else image by image without padding."""
    if len(set(images.sizes)) == 1:
        return [(images, targets)]
    return [
        (pad_images([images.images[i, :, :height, :width]]), targets[i : i + 1])
        for i, (height, width) in enumerate(images.sizes)
    ]


class Interrupted(Exception):
    """An evaluation was asked to end early."""


def until_stopped(batches: Iterable[T], world: World, stopping: Callable[[], bool]) -> Iterator[T]:
    """Yield a process's batches, until `stopping()` holds in any process of `world`.

    Every two seconds the processes exchange this, since none can continue without the others. One
    that has no more batches waits here for those that have.

    Raises:
        Interrupted: in every process, after the same exchange.
    """

    def all_done(done: bool) -> bool:
        stop, finished = world.sum([stopping(), done])
        if stop:
            raise Interrupted
        return finished == world.size

    last = time.monotonic()
    for batch in batches:
        yield batch
        if time.monotonic() - last > _ASK_EVERY:
            all_done(False)
            last = time.monotonic()
    while not all_done(True):
        pass


def evaluate(
    model: nn.Module,
    postprocess: PostProcess,
    batches: Iterable[Batch],
    evaluator: Evaluator,
    *,
    device: torch.device,
    criterion: SetCriterion | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    world: World | None = None,
    stopping: Callable[[], bool] = lambda: False,
    tiling: Tiling | None = None,
) -> tuple[EvalResult, dict[str, float]]:
    """Evaluate on a data set; return COCO's numbers and the mean losses.

    Each process of `world` passes its own `batches` and gets the result; the detections of all
    are collected in the main process's evaluator alone. With `tiling`, these are `TileBatches`.

    Raises:
        Interrupted: `stopping()` held in any process; see `until_stopped`.
        FloatingPointError: a loss is not finite.
    """
    world, averages = world or World(), Averages()

    def add_losses(outputs: DetectorOutput, targets: Sequence[Target]) -> None:
        assert criterion is not None
        losses = criterion(outputs, targets)
        values = torch.stack([v.float() for v in losses.values()])
        if not values.isfinite().all():
            images = ", ".join(str(int(t["image_id"])) for t in targets)
            raise FloatingPointError(f"the loss of image {images} is not finite")
        averages.add(dict(zip(losses, values.tolist(), strict=True)))

    results = detect(
        model,
        postprocess,
        batches,
        device=device,
        description="evaluate" if world.main else None,
        on_outputs=add_losses if criterion is not None else None,
        autocast=autocast,
    )
    for target, found in by_image(until_stopped(results, world, stopping), tiling):
        evaluator.update([int(target["image_id"])], [found])
    parts = world.gather((evaluator.detections(), averages))
    for others, means in parts[1:]:
        evaluator.add(others)
        if means.count:
            averages.add(means.totals, means.count)
    result, averages = world.broadcast(
        (evaluator.evaluate(), averages) if world.main else (None, averages)
    )
    assert result is not None
    losses = averages.means()
    return result, official_log_values(losses, criterion) if criterion else losses
