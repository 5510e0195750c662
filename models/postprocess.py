"""Outputs of the detector to boxes in pixels."""

import torch
from torch import Tensor

from models.deformable_detr import DetectorOutput
from util.box_ops import cxcywh_to_xyxy


class PostProcess:
    """Keep the best (query, class) pairs of each picture; no suppression is needed."""

    def __init__(self, *, max_detections: int = 100) -> None:
        self.max_detections = max_detections

    @torch.no_grad()
    def __call__(self, outputs: DetectorOutput, orig_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return `scores` [K], `labels` [K] and `boxes` [K,4] of each picture, best first.

        Shape: orig_sizes [N,2] as (height, width) in pixels. Units: boxes are xyxy pixels of the
            original picture, not clipped to it.
        """
        exact = torch.promote_types(outputs["pred_logits"].dtype, torch.float32)
        probability = outputs["pred_logits"].to(exact).sigmoid()
        n, q, classes = probability.shape
        count = min(self.max_detections, q * classes)
        scores, index = probability.view(n, -1).topk(count, dim=1)
        query, labels = index // classes, index % classes
        boxes = cxcywh_to_xyxy(outputs["pred_boxes"].to(exact))
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        height, width = orig_sizes.to(boxes).unbind(1)
        boxes = boxes * torch.stack([width, height, width, height], dim=1)[:, None]
        return [
            {"scores": s, "labels": c, "boxes": b}
            for s, c, b in zip(scores, labels, boxes, strict=True)
        ]
