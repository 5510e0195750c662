"""Inference over a data set, and its COCO evaluation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.coco_evaluator import CocoEvaluator, EvalResult
from engine.train import Averages, Criterion, UnreadableImages, official_log_values
from util.batch import Batch, Target

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

    Unreadable pictures are named; a batch of nothing else has no detections. `on_outputs` sees
    the raw outputs.
    """
    model.eval()
    unreadable = UnreadableImages()
    for batch in tqdm(batches, desc=description, unit="batch", dynamic_ncols=True, leave=False):
        unreadable.report(batch)
        if batch.images is None:
            yield batch, []
            continue
        outputs = model(batch.images.to(device))
        if on_outputs is not None:
            on_outputs(outputs, batch.targets)
        sizes = torch.stack([t["orig_size"] for t in batch.targets])
        detections = postprocess(outputs, sizes.to(device))
        yield batch, [{k: v.cpu() for k, v in d.items()} for d in detections]


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
