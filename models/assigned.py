"""Predictions beside what they should be: what losses are functions of."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchvision.ops import box_convert

from models.matcher import Matches, PaddedTargets, overlaps

# G prediction layers, N batch, Q predictions, P matched pairs.


@dataclass(frozen=True)
class Assigned:
    """Predictions of one group beside what they should be, in float32 or better.

    Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4]; classes [G,N,Q,classes], 1 where a query is
    matched with an object of a class, else 0; matched_boxes and target_boxes [G,P,4], those of
    the pairs in `matches`, the same box on both sides where there is no pair; labels [G,P].
    Boxes are normalised cxcywh. `name` is that of the group. `weights` [P] says how much each pair
    counts, None for 1.
    """

    name: str
    logits: Tensor
    boxes: Tensor
    classes: Tensor
    matched_boxes: Tensor
    target_boxes: Tensor
    labels: Tensor
    matches: Matches
    focal_alpha: float
    weights: Tensor | None = None

    def total(self, values: Tensor) -> Tensor:
        """Sum up values of every pair, each by its weight. Shape: [G,P] or [G,P,4] -> [G]."""
        if self.weights is not None:
            values = values * self.weights.reshape(-1, *[1] * (values.dim() - 2))
        return values.sum(tuple(range(1, values.dim())))

    @cached_property
    def iou(self) -> Tensor:
        """Return the IoU of every pair, without a gradient. Shape: [G,P]. Range: 0..1."""
        return self._overlaps[0]

    @cached_property
    def giou(self) -> Tensor:
        """Return the GIoU of every pair, without a gradient. Shape: [G,P]. Range: -1..1."""
        return self._overlaps[1]

    @cached_property
    def _overlaps(self) -> tuple[Tensor, Tensor]:
        both = (self.matched_boxes.detach(), self.target_boxes)
        return overlaps(*(box_convert(boxes, "cxcywh", "xyxy") for boxes in both))

    def on_classes(self, values: Tensor) -> Tensor:
        """Put a value of every pair where `classes` is 1. Shape: [G,P] -> [G,N,Q,classes]."""
        return _on_classes(values, self.logits, self.labels, self.matches)


def assign(
    name: str,
    logits: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    matches: Matches,
    *,
    focal_alpha: float,
    weights: Tensor | None = None,
) -> Assigned:
    """Put predictions beside their targets. Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4]."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    logits, boxes = logits.to(exact), boxes.to(exact)
    layer = torch.arange(len(logits), device=logits.device)[:, None]  # [G,1]
    labels = targets.labels[matches.image, matches.target].expand(len(logits), -1)
    matched = boxes[layer, matches.image, matches.query]
    target = targets.boxes[matches.image, matches.target].to(exact)
    if matches.real is not None:  # of what is no pair, nothing is learned
        matched = torch.where(matches.real[..., None], matched, 0.5)
        target = torch.where(matches.real[..., None], target, 0.5)
    classes = _on_classes(torch.ones_like(labels, dtype=exact), logits, labels, matches)
    return Assigned(
        name, logits, boxes, classes, matched, target, labels, matches, focal_alpha, weights
    )


def _on_classes(values: Tensor, like: Tensor, labels: Tensor, matches: Matches) -> Tensor:
    layer = torch.arange(len(like), device=like.device)[:, None]
    place = (layer, matches.image, matches.query, labels)
    if matches.chosen is None:
        return torch.zeros_like(like).index_put(place, values)
    # a query learns one class: where several of its pairs meet, all but one add 0
    values = values.masked_fill(~matches.chosen, 0.0)
    return torch.zeros_like(like).index_put(place, values, accumulate=True)
