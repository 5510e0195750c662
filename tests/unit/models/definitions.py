"""The training loss as the papers define it: loops over images, pairs and classes.

It shares no code with the package, and autograd works through it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Coefficients:
    """Weights of class, L1 and GIoU in the matching cost and in the loss, and the focal alpha."""

    cost: tuple[float, float, float] = (2.0, 5.0, 2.0)
    loss: tuple[float, float, float] = (2.0, 5.0, 2.0)
    alpha: float = 0.25


def corners(box: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x0, y0, x1, y1 of one cxcywh box."""
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU of two cxcywh boxes (arXiv 1902.09630, Algorithm 1)."""
    ax0, ay0, ax1, ay1 = corners(a)
    bx0, by0, bx1, by1 = corners(b)
    width = torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)
    height = torch.minimum(ay1, by1) - torch.maximum(ay0, by0)
    inter = width * height if width > 0 and height > 0 else torch.zeros_like(width)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter
    hull = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (
        torch.maximum(ay1, by1) - torch.minimum(ay0, by0)
    )
    return inter / union - (hull - union) / hull


def focal(logit: Tensor, positive: bool, alpha: float) -> Tensor:
    """Return -alpha_t (1 - p_t)^2 log(p_t) of one logit (arXiv 1708.02002, Eq. 5)."""
    if positive:
        return -alpha * (1 - logit.sigmoid()) ** 2 * F.logsigmoid(logit)
    return -(1 - alpha) * logit.sigmoid() ** 2 * F.logsigmoid(-logit)


def match(logits: Tensor, boxes: Tensor, target: Target, c: Coefficients) -> list[tuple[int, int]]:
    """Return the cheapest (query, target) pairs of one image. Shape: [Q,classes], [Q,4]."""
    cost = np.zeros((len(logits), len(target["labels"])))
    for q, t in itertools.product(*map(range, cost.shape)):
        p = 1 / (1 + math.exp(-float(logits[q, target["labels"][t]])))
        gain = c.alpha * (1 - p) ** 2 * -math.log(p + 1e-8)
        loss = (1 - c.alpha) * p**2 * -math.log(1 - p + 1e-8)
        distance = float((boxes[q] - target["boxes"][t]).abs().sum())
        overlap = float(giou(boxes[q], target["boxes"][t]))
        cost[q, t] = c.cost[0] * (gain - loss) + c.cost[1] * distance - c.cost[2] * overlap
    return list(zip(*map(np.ndarray.tolist, linear_sum_assignment(cost)), strict=True))


def layer_losses(
    logits: Tensor, boxes: Tensor, targets: Sequence[Target], c: Coefficients
) -> dict[str, Tensor]:
    """Return the losses of one layer. Shape: logits [N,Q,classes]; boxes [N,Q,4]."""
    ce, l1, overlap = (logits.new_zeros(()) for _ in range(3))
    for image, target in enumerate(targets):
        pairs = match(logits[image].detach(), boxes[image].detach(), target, c)
        positive = {(q, int(target["labels"][t])) for q, t in pairs}
        for q, k in itertools.product(range(logits.shape[1]), range(logits.shape[2])):
            ce = ce + focal(logits[image, q, k], (q, k) in positive, c.alpha)
        for q, t in pairs:
            l1 = l1 + (boxes[image, q] - target["boxes"][t]).abs().sum()
            overlap = overlap + 1 - giou(boxes[image, q], target["boxes"][t])
    count = max(sum(len(t["labels"]) for t in targets), 1)
    return {"loss_ce": ce / count, "loss_bbox": l1 / count, "loss_giou": overlap / count}


def total_loss(
    layer_logits: Tensor,
    layer_boxes: Tensor,
    targets: Sequence[Target],
    c: Coefficients,
    encoder: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum over all layers and the losses by their official names."""
    last = len(layer_logits) - 1
    named = {}
    for index, (logits, boxes) in enumerate(zip(layer_logits, layer_boxes, strict=True)):
        suffix = "" if index == last else f"_{index}"
        for name, value in layer_losses(logits, boxes, targets, c).items():
            named[name + suffix] = value
    if encoder is not None:
        binary = [t | {"labels": torch.zeros_like(t["labels"])} for t in targets]
        for name, value in layer_losses(*encoder, binary, c).items():
            named[f"{name}_enc"] = value
    weight = dict(zip(("loss_ce", "loss_bbox", "loss_giou"), c.loss, strict=True))
    terms = [value * weight["_".join(n.split("_")[:2])] for n, value in named.items()]
    return torch.stack(terms).sum(), named


def random_targets(counts: Sequence[int], classes: int) -> list[Target]:
    """Return float64 targets with boxes inside the image."""
    targets = []
    for count in counts:
        size = torch.rand(count, 2, dtype=torch.float64) * 0.5 + 0.05
        centre = size / 2 + (1 - size) * torch.rand(count, 2, dtype=torch.float64)
        labels = torch.randint(classes, (count,))
        targets.append({"labels": labels, "boxes": torch.cat([centre, size], dim=1)})
    return targets
