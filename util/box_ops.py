"""Box arithmetic. Boxes are (cx, cy, w, h) or (x0, y0, x1, y1), in any one unit."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert centre and size to corners. Shape: [...,4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners to centre and size. Shape: [...,4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Return the area of boxes. Shape: [...,4] -> [...]."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(-1)


def _iou_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = box_area(a) + box_area(b) - overlap
    # Two boxes without area share nothing: 0, where 0 / 0 would spread NaN through the loss.
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny), union


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the GIoU of boxes that broadcast against each other (arXiv 1902.09630).

    Shape: a, b [...,4] xyxy -> [...]; pairwise: `generalized_iou(a[:, None], b[None])`.
    Range: -1..1; boxes without area are legal.
    """
    iou, union = _iou_and_union(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return iou - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).tiny)
