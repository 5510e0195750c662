"""The set-prediction loss: functions of matched predictions by name, and their sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from models.group_matching import learners, match_groups
from models.losses import CLASS_LOSSES, CLASSIFICATION, LOSSES, class_loss, register_loss
from models.matcher import (
    HungarianMatcher,
    Matches,
    PaddedTargets,
    generalized_iou,
    pad_targets,
)
from models.queries import DetectorOutput, GroupOutput, Learning
from util.batch import EffectiveBatch, Target

# G prediction layers, N batch, Q predictions, P matched pairs.


@dataclass(frozen=True)
class Assigned:
    """Predictions of one group beside what they should be, in float32 or better.

    Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4]; classes [G,N,Q,classes], 1 where a query is
    matched with an object of a class, else 0; matched_boxes and target_boxes [G,P,4], those of
    the pairs in `matches`, the same box on both sides where there is no pair; labels [G,P].
    Boxes are normalised cxcywh. `name` is that of the group. `weights` [P] or [G,P] says how much
    each pair counts, None for 1.
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
            values = values * self.weights.reshape(*self.weights.shape, *[1] * (values.dim() - 2))
        return values.sum(tuple(range(1, values.dim())))


def assign(
    name: str,
    logits: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    matches: Matches,
    *,
    focal_alpha: float,
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
    classes = on_classes(torch.ones_like(labels, dtype=exact), logits, labels, matches)
    return Assigned(name, logits, boxes, classes, matched, target, labels, matches, focal_alpha)


def on_classes(values: Tensor, like: Tensor, labels: Tensor, matches: Matches) -> Tensor:
    """Put a value of every pair where its query has its class, and 0 elsewhere.

    Shape: values, labels [G,P]; like [G,N,Q,classes] -> the same.
    """
    layer = torch.arange(len(like), device=like.device)[:, None]
    place = (layer, matches.image, matches.query, labels)
    if matches.chosen is None:
        return torch.zeros_like(like).index_put(place, values)
    # a query learns one class: where several of its pairs meet, all but one add 0
    values = values.masked_fill(~matches.chosen, 0.0)
    return torch.zeros_like(like).index_put(place, values, accumulate=True)


@class_loss("focal", coefficient=2.0)
def focal(assigned: Assigned) -> Tensor:
    """Focal loss of all queries: most see background, which cross-entropy would learn alone.

    Every class is a question of its own. Unlike DETR's softmax, it needs no class for "no object":
    of background, all are false (Sec. 5).
    """
    loss: Tensor = sigmoid_focal_loss(assigned.logits, assigned.classes, alpha=assigned.focal_alpha)
    return loss.sum((1, 2, 3))


@register_loss("loss_bbox")
def box_distance(assigned: Assigned) -> Tensor:
    """L1 distance of matched boxes (DETR, Sec. 3.1): a few pixels weigh more on a small box."""
    return assigned.total((assigned.matched_boxes - assigned.target_boxes).abs())


@register_loss("loss_giou")
def box_overlap(assigned: Assigned) -> Tensor:
    """GIoU loss of matched boxes, which does not depend on the size (DETR, Sec. 3.1)."""
    matched = box_convert(assigned.matched_boxes, "cxcywh", "xyxy")
    target = box_convert(assigned.target_boxes, "cxcywh", "xyxy")
    return assigned.total(1 - generalized_iou(matched, target))


class SetCriterion:
    """Match predictions with targets, then sum up their losses (Sec. 4, DETR Sec. 3.1).

    `weights` maps losses to their coefficients: "loss_ce", which is the one that `cls_loss` names,
    and registered ones. `whole` describes the effective batch that a batch is part of.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        *,
        weights: Mapping[str, float],
        cls_loss: str = "focal",
        focal_alpha: float = 0.25,
    ) -> None:
        self.matcher = matcher
        self.whole: EffectiveBatch | None = None
        self.weights = dict(weights)
        self._group_weights: dict[str, float] = {}
        self.losses = {
            name: (CLASS_LOSSES[cls_loss] if name == CLASSIFICATION else LOSSES[name]).function
            for name in weights
        }
        self.focal_alpha = focal_alpha

    def __call__(
        self,
        outputs: DetectorOutput,
        targets: Sequence[Target],
        num_boxes: float | None = None,
    ) -> dict[str, Tensor]:
        """Return unweighted losses under the official names, and `loss`, their weighted sum.

        Every loss is a sum over the batch divided by `num_boxes`, by default the batch's own
        count and at least 1; a batch that is part of a larger one is given the larger one's.
        The last decoder layer has bare names, earlier ones end in `_0`, `_1`, ..., a two-stage
        encoder in `_enc`; a recipe's group has its own suffix before that of the layer.
        `class_error` is the percentage of matched queries of the last layer whose best class is
        wrong, times the batch's share of `num_boxes`: the values of the parts of a larger batch
        add up to the mean over its boxes. It carries no gradient.

        A prediction that is not finite makes the loss NaN or infinite; nothing is raised.
        """
        groups = [g if g.learning.size is None else learners(g) for g in outputs["groups"]]
        padded = pad_targets(targets, groups[0].logits.device)
        own_boxes = sum(padded.counts)
        divisor = max(own_boxes, 1) if num_boxes is None else num_boxes
        owned = [g.learning.targets(padded) if g.learning.targets else padded for g in groups]
        if all(_cheapest(group.learning) for group in groups):
            triples = zip(groups, owned, strict=True)
            matches = self.matcher([(group.logits, group.boxes, own) for group, own in triples])
        else:
            matches = match_groups(self.matcher, groups, owned)
        losses: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        for group, own, matched in zip(groups, owned, matches, strict=True):
            layers = [*(f"_{i}" for i in range(len(group.logits) - 1)), ""]
            learning = group.learning
            assigned = self.assign(group, own, matched)
            on_boxes = self.on_boxes(group, own, matched, assigned)
            for name, loss in self.losses.items():
                on = assigned if name == CLASSIFICATION else on_boxes
                values = loss(on) / (divisor * learning.divisor)
                coefficient = self.weights[name] * learning.weight * learning.factors.get(name, 1.0)
                self._group_weights[f"{name}{group.name}"] = coefficient
                for layer, value in zip(layers, values, strict=True):
                    losses[f"{name}{group.name}{layer}"] = value
                    weighted.append(coefficient * value)
        for name, values in outputs.get("image_losses", {}).items():
            whole = self.whole if num_boxes and self.whole else EffectiveBatch.of(targets)
            losses[name] = values.sum() * (max(whole.boxes, 1) / whole.images / divisor)
            self._group_weights[name] = 1.0
            weighted.append(losses[name])
        error = class_error(groups[0].logits[-1], padded, matches[0]) * (own_boxes / divisor)
        return {"loss": torch.stack(weighted).sum(), **losses, "class_error": error}

    @property
    def progress(self) -> float:
        """The part of the training that is done, 0..1, on which the matching cost may depend."""
        return self.matcher.progress

    @progress.setter
    def progress(self, part: float) -> None:
        self.matcher.progress = part

    def weight(self, name: str) -> float | None:
        """Return the coefficient of a loss of any layer, None for what is only reported."""
        weights = {**self.weights, **self._group_weights}
        known = [base for base in weights if f"{name}_".startswith(f"{base}_")]
        return weights[max(known, key=len)] if known else None

    def assign(self, group: GroupOutput, targets: PaddedTargets, matches: Matches) -> Assigned:
        """Put the predictions of a group beside its targets."""
        alpha = self.focal_alpha
        return assign(group.name, group.logits, group.boxes, targets, matches, focal_alpha=alpha)

    def on_boxes(
        self, group: GroupOutput, targets: PaddedTargets, matches: Matches, assigned: Assigned
    ) -> Assigned:
        """Return what the losses of boxes learn: here, the pairs that classes learn."""
        return assigned


def _cheapest(learning: Learning) -> bool:
    """Return whether the pairs are the cheapest ones of all predictions."""
    known = learning.matches is not None or learning.assign is not None
    return not known and learning.anchors is None and learning.parts == 1


@torch.no_grad()
def class_error(logits: Tensor, targets: PaddedTargets, matches: Matches) -> Tensor:
    """Return the percentage of matched queries of the last layer with a wrong best class.

    Shape: logits [N,Q,classes]; 0 where nothing is matched.
    """
    best = logits[matches.image, matches.query[-1]].argmax(-1)
    actual = targets.labels[matches.image, matches.target[-1]]
    wrong = best != actual
    if matches.real is not None:
        return 100 * (wrong & matches.real[-1]).sum() / matches.real[-1].sum().clamp(min=1)
    return 100 * wrong.sum().to(torch.float32) / max(len(matches.image), 1)
