"""Other classification losses than the focal loss, by name, and how much each error counts.

The focal loss teaches a score to say what is there. These teach it to say how well the box fits as
well: the score that keeps a detection is then that of its best box.

All are sums over a batch, of every layer, before the division by the number of boxes. z is a
logit, p its sigmoid, u the IoU of a matched prediction with its object, y 1 for the class of a
query that is matched and else 0. No gradient passes through u.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from models.criterion import Assigned, focal, on_classes
from models.losses import class_loss
from models.matcher import overlaps

_POSITION_SUPERVISED = 6.0  # its coefficient


@class_loss("vfl", coefficient=1.0)
def varifocal(assigned: Assigned) -> Tensor:
    """Varifocal loss: a score should be u, and good boxes count more (arXiv 2008.13367, Eq. 2)."""
    z, y = assigned.logits, assigned.classes
    target = _on_classes(assigned, _overlaps(assigned)[0])
    # alpha of the focal loss weighs positives, 1 - alpha the rest
    weight = (1 - assigned.focal_alpha) * z.detach().sigmoid() ** 2 * (1 - y) + target
    return (F.binary_cross_entropy_with_logits(z, target, reduction="none") * weight).sum((1, 2, 3))


@class_loss("mal", coefficient=1.0)
def matchability_aware(assigned: Assigned, gamma: float = 1.5) -> Tensor:
    """Matchability-aware loss: a bad match counts in full (DEIM, arXiv 2412.04234, Eq. 3)."""
    z, y = assigned.logits, assigned.classes
    target = _on_classes(assigned, _overlaps(assigned)[0] ** gamma)
    weight = z.detach().sigmoid() ** gamma * (1 - y) + y
    return (F.binary_cross_entropy_with_logits(z, target, reduction="none") * weight).sum((1, 2, 3))


@class_loss("ia_bce", coefficient=1.0)
def iou_aware_bce(assigned: Assigned, alpha: float = 0.25) -> Tensor:
    """IoU-aware cross-entropy: a score should be p^a u^(1-a) (Align-DETR, arXiv 2304.07527).

    Where several queries learn an object, that is multiplied by the weight of each.
    """
    z, y = assigned.logits, assigned.classes
    p = z.sigmoid()
    iou = _on_classes(assigned, _overlaps(assigned)[0])
    target = (p.detach() ** alpha * iou ** (1 - alpha)).clamp(min=0.01) * y
    if assigned.weights is not None:
        target = target * _on_classes(assigned, assigned.weights.expand_as(assigned.labels))
    negative = (1 - target) * y + p**2 * (1 - y)
    # -t log p - n log(1 - p), where log(1 - p) is log p - z
    return (negative * z - F.logsigmoid(z) * (target + negative)).sum((1, 2, 3))


def agreement(assigned: Assigned, alpha: float = 0.25) -> Tensor:
    """Return p^a u^(1-a) of every pair, what `ia_bce` teaches scores. Shape: [G,P]."""
    layer = torch.arange(len(assigned.logits), device=assigned.logits.device)[:, None]
    matches = assigned.matches
    p = assigned.logits.detach()[layer, matches.image, matches.query, assigned.labels].sigmoid()
    return (p**alpha * _overlaps(assigned)[0] ** (1 - alpha)).clamp(min=0.01)


@class_loss("position_supervised", coefficient=_POSITION_SUPERVISED)
def position_supervised(assigned: Assigned) -> Tensor:
    """Focal loss whose target is u^2, the best match of an image 1 (arXiv 2304.04742, Eq. 7).

    Denoising queries keep the plain focal loss, with coefficient 1 where that of the rest is 6.
    """
    if assigned.name == "_dn":
        return focal(assigned) / _POSITION_SUPERVISED
    squared = _on_classes(assigned, _overlaps(assigned)[0] ** 2)
    best = squared.amax((2, 3), keepdim=True)
    scaled = squared / torch.where(best > 0, best, 1.0)
    return _focal_towards(assigned, scaled)


@class_loss("giou_focal", coefficient=2.0)
def giou_focal(assigned: Assigned) -> Tensor:
    """Focal loss whose target is (GIoU + 1) / 2; a two-stage encoder keeps the plain one.

    Rank-DETR, arXiv 2310.08854, Eq. 5.
    """
    if assigned.name.endswith("_enc"):
        return focal(assigned)
    return _focal_towards(assigned, _on_classes(assigned, (_overlaps(assigned)[1] + 1) / 2))


def _focal_towards(assigned: Assigned, target: Tensor) -> Tensor:
    """Return cross-entropy with a soft target, weighted by the squared distance to it."""
    z, y, alpha = assigned.logits, assigned.classes, assigned.focal_alpha
    weight = (alpha * y + (1 - alpha) * (1 - y)) * (target - z.sigmoid()) ** 2
    return (F.binary_cross_entropy_with_logits(z, target, reduction="none") * weight).sum((1, 2, 3))


def _overlaps(assigned: Assigned) -> tuple[Tensor, Tensor]:
    """Return IoU and GIoU of every pair, without a gradient. Shape: [G,P] each."""
    both = (assigned.matched_boxes.detach(), assigned.target_boxes)
    return overlaps(*(box_convert(boxes, "cxcywh", "xyxy") for boxes in both))


def _on_classes(assigned: Assigned, values: Tensor) -> Tensor:
    """Put a value of every pair where `classes` is 1. Shape: [G,P] -> [G,N,Q,classes]."""
    return on_classes(values, assigned.logits, assigned.labels, assigned.matches)
