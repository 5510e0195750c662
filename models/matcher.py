"""Optimal assignment of targets to predictions (DETR, Sec. 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from util.batch import Target

_NOT_FINITE = 1e6  # the cost of what has none: far above any other

# G prediction layers, N batch, Q predictions, T targets of an image (padded to the longest).


@dataclass(frozen=True)
class PaddedTargets:
    """Targets of a batch in rectangular tensors.

    Shape: labels [N,T] (0 where padded); boxes [N,T,4] cxcywh; counts per image.
    """

    labels: Tensor
    boxes: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Matches:
    """Matched pairs of every layer; each layer has the same number P of them.

    Where layers have different numbers, `real` marks pairs, not padding. Where a query stands for
    several targets, it learns the class of the one in `chosen`.

    Shape: image [P] or [G,P]; query and target [G,P]: prediction `query[g, p]` of image `image[p]`
    stands for that image's target `target[g, p]`; real, chosen [G,P] bool, None for all pairs.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    real: Tensor | None = None
    chosen: Tensor | None = None


def pad_targets(targets: Sequence[Target], device: torch.device) -> PaddedTargets:
    """Put the targets of a batch into rectangular tensors on `device`."""
    labels, boxes = (
        pad_sequence([t[name] for t in targets], batch_first=True) for name in ("labels", "boxes")
    )
    return PaddedTargets(
        labels.to(device, non_blocking=True),
        boxes.to(device, non_blocking=True),
        [len(t["labels"]) for t in targets],
    )


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and GIoU of boxes that broadcast against each other (arXiv 1902.09630).

    Shape: a, b [...,4] xyxy -> [...] twice; pairwise: `overlaps(a[:, None], b[None])`.
    Range: 0..1 and -1..1; boxes without area are legal.
    """
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    union = area_a + area_b - overlap
    # two boxes without area share nothing: 0, where 0 / 0 would spread NaN through the loss
    tiny = torch.finfo(union.dtype).tiny
    iou = overlap / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the GIoU of boxes that broadcast against each other; see `overlaps`."""
    return overlaps(a, b)[1]


class HungarianMatcher:
    """Find the cheapest assignment by class, box distance and GIoU (DETR, Sec. 3.1).

    The costs are those that the losses punish, and are weighted alike: of all ways to share the
    objects out among the queries, the one that is closest to being right is what they learn.

    `models/match_costs.py` has other costs; they may depend on `progress`, the part of the training
    that is done.
    """

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        focal_alpha: float = 0.25,
    ) -> None:
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("all matching costs are 0")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.focal_alpha = focal_alpha
        self.progress = 0.0

    @torch.no_grad()
    def cost(self, logits: Tensor | None, boxes: Tensor, targets: PaddedTargets) -> Tensor:
        """Return what each assignment costs; columns of padded targets mean nothing.

        Without logits, classes cost nothing.

        Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4] cxcywh; returns [G,N,Q,T].
        """
        exact = torch.promote_types(boxes.dtype, torch.float32)
        boxes, target = boxes.to(exact)[:, :, :, None], targets.boxes.to(exact)[None, :, None]
        corners = (box_convert(either, "cxcywh", "xyxy") for either in (boxes, target))
        iou, giou = overlaps(*corners)
        distance = (boxes - target).abs().sum(-1)
        if logits is None:
            return self.cost_bbox * distance - self.cost_giou * giou
        index = targets.labels[None, :, None].expand(*logits.shape[:3], -1)
        probability = logits.to(exact).gather(3, index).sigmoid()  # [G,N,Q,T], the target's class
        return self.total(probability, distance, iou, giou, targets.counts)

    def total(
        self, score: Tensor, distance: Tensor, iou: Tensor, giou: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Return the cost of queries by their score for a target's class and their box.

        Shape: all [G,N,Q,T], of which an image has `counts` targets; the others are padding.
        """
        # how much more focal loss the query would have with the target than as background
        positive = self.focal_alpha * (1 - score) ** 2 * -(score + 1e-8).log()
        negative = (1 - self.focal_alpha) * score**2 * -(1 - score + 1e-8).log()
        return (
            self.cost_class * (positive - negative)
            + self.cost_bbox * distance
            - self.cost_giou * giou
        )

    def __call__(
        self, groups: Sequence[tuple[Tensor | None, Tensor, PaddedTargets]]
    ) -> list[Matches]:
        """Assign every target of every layer of every group, with one transfer to the host.

        Shape: each group is logits [G,N,Q,classes] or None, boxes [G,N,Q,4] and its targets; an
            image with more targets than predictions keeps its Q cheapest. A cost that is not
            finite counts as a very high one: it is for the loss to show it.
        """
        if not groups:  # all know their pairs, or find them otherwise
            return []
        costs = [self.cost(*group) for group in groups]
        flat = torch.cat([c.flatten() for c in costs]).cpu().numpy()
        flat[~np.isfinite(flat)] = _NOT_FINITE
        ends = np.cumsum([cost.numel() for cost in costs])
        return [
            _assign(block.reshape(cost.shape), targets.counts, cost.device)
            for block, cost, (_, _, targets) in zip(
                np.split(flat, ends[:-1]), costs, groups, strict=True
            )
        ]


def _assign(cost: "np.ndarray[Any, Any]", counts: Sequence[int], device: torch.device) -> Matches:
    """Solve every layer and image of a cost block [G,N,Q,T] on the host."""
    pairs = [
        [linear_sum_assignment(c[:, :n]) for c, n in zip(layer, counts, strict=True)]
        for layer in cost
    ]
    query, target = np.stack([np.concatenate(layer, axis=1) for layer in pairs], axis=1)  # [G,P]
    images = np.repeat(np.arange(len(counts)), [min(n, cost.shape[2]) for n in counts])
    packed = torch.from_numpy(np.concatenate([images[None], query, target]))
    packed = packed.to(device, non_blocking=True)
    return Matches(packed[0], packed[1 : len(cost) + 1], packed[len(cost) + 1 :])
