"""Inference over a data set, and its COCO evaluation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.coco_evaluator import CocoEvaluator, EvalResult
from engine.train import Averages, Criterion, UnreadableImages, official_log_values
from util.batch import Batch, PaddedBatch, Target, pad_images

PostProcessor = Callable[[Any, Tensor], list[dict[str, Tensor]]]


@torch.inference_mode()
def detect(
    model: nn.Module,
    postprocess: PostProcessor,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    description: str,
    on_outputs: Callable[[Any, Sequence[Target]], None] | None = None,
) -> Iterator[tuple[Batch, list[dict[str, Tensor]]]]:
    """Yield every batch with its detections (pixels of the original pictures, on the host).

    Unreadable pictures are named; a batch of nothing else has no detections. Pictures that turn
    out to differ in size go through the model one by one, so that none sees padding. `on_outputs`
    sees the raw outputs.
    """
    model.eval()
    unreadable = UnreadableImages()
    for batch in tqdm(batches, desc=description, unit="batch", dynamic_ncols=True, leave=False):
        unreadable.report(batch)
        if batch.images is None:
            yield batch, []
            continue
        found: list[dict[str, Tensor]] = []
        for images, targets in unpadded_parts(batch.images, batch.targets):
            outputs = model(images.to(device))
            if on_outputs is not None:
                on_outputs(outputs, targets)
            sizes = torch.stack([t["orig_size"] for t in targets])
            found += postprocess(outputs, sizes.to(device))
        yield batch, [{k: v.cpu() for k, v in d.items()} for d in found]


def unpadded_parts(
    images: PaddedBatch, targets: Sequence[Target]
) -> Iterator[tuple[PaddedBatch, Sequence[Target]]]:
    """Yield a batch whole where nothing is padded, else picture by picture without padding."""
    if len(set(images.sizes)) == 1:
        yield images, targets
        return
    for i, (height, width) in enumerate(images.sizes):
        yield pad_images([images.images[i, :, :height, :width]]), targets[i : i + 1]


def evaluate(
    model: nn.Module,
    postprocess: PostProcessor,
    batches: Iterable[Batch],
    evaluator: CocoEvaluator,
    *,
    device: torch.device,
    criterion: Criterion | None = None,
) -> tuple[EvalResult, dict[str, float]]:
    """Evaluate on a data set; return COCO's numbers and the mean losses."""
    averages = Averages()

    def add_losses(outputs: Any, targets: Sequence[Target]) -> None:
        assert criterion is not None
        losses = criterion(outputs, targets)
        averages.add(list(losses), torch.stack([v.detach().float() for v in losses.values()]))

    results = detect(
        model,
        postprocess,
        batches,
        device=device,
        description="evaluate",
        on_outputs=add_losses if criterion is not None else None,
    )
    for batch, detections in results:
        evaluator.update([int(t["image_id"]) for t in batch.targets], detections)
    means = averages.means()
    return evaluator.evaluate(), official_log_values(means, criterion) if criterion else means
