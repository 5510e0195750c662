"""Outputs of the detector to boxes in pixels."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from models.queries import DetectorOutput

_CANDIDATES = 3  # for each detection, where some are suppressed


class PostProcess:
    """Keep the best (query, class) pairs of each image.

    A model trained to the end finds each object once. One that was trained for minutes has not yet
    learned to, and gains much by `nms_iou` below 1: of two boxes of a class whose IoU is greater,
    the better one stays.
    """

    def __init__(self, *, max_detections: int = 100, nms_iou: float | None = None) -> None:
        """Keep at most `max_detections` of an image, all classes together."""
        self.max_detections, self.nms_iou = max_detections, nms_iou

    @torch.no_grad()
    def __call__(self, outputs: DetectorOutput, orig_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return `scores`, `labels`, `queries` [K] and `boxes` [K,4] of each image, best first.

        K is the same for all images unless some are suppressed; `queries` are those that found
        them.

        Shape: orig_sizes [N,2] as (height, width) in pixels. Units: boxes are xyxy pixels of the
            original image, not clipped to it.
        """
        best = self.best(outputs, orig_sizes)
        images = zip(*best.values(), strict=True)
        results = [dict(zip(best, values, strict=True)) for values in images]
        return [self._suppressed(result) for result in results] if self._suppresses else results

    @property
    def _suppresses(self) -> bool:
        return self.nms_iou is not None and self.nms_iou < 1

    def best(self, outputs: DetectorOutput, orig_sizes: Tensor) -> dict[str, Tensor]:
        """Return the same of all images at once, none suppressed. Shape: [N,K] and [N,K,4]."""
        exact = torch.promote_types(outputs["pred_logits"].dtype, torch.float32)
        probability = outputs["pred_logits"].to(exact).sigmoid()
        n, q, classes = probability.shape
        count = min(self.max_detections * (_CANDIDATES if self._suppresses else 1), q * classes)
        scores, index = probability.view(n, -1).topk(count, dim=1)
        query, labels = index // classes, index % classes
        boxes = box_convert(outputs["pred_boxes"].to(exact), "cxcywh", "xyxy")
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        height, width = orig_sizes.to(boxes).unbind(1)
        boxes = boxes * torch.stack([width, height, width, height], dim=1)[:, None]
        return {"scores": scores, "labels": labels, "queries": query, "boxes": boxes}

    def _suppressed(self, result: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = batched_nms(result["boxes"], result["scores"], result["labels"], self.nms_iou)
        return {name: tensor[kept[: self.max_detections]] for name, tensor in result.items()}
