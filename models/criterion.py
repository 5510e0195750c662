"""The set-prediction loss: functions of matched predictions by name, and their sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from models.matcher import HungarianMatcher, Matches, PaddedTargets, generalized_iou, pad_targets
from models.queries import DetectorOutput, GroupOutput
from util.batch import Target
from util.registry import Registry

# G prediction layers, N batch, Q predictions, P matched pairs.


@dataclass(frozen=True)
class Assigned:
    """Predictions of one group beside what they should be, in float32 or better.

    Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4]; classes [G,N,Q,classes], 1 where a query is
    matched with an object of a class, else 0; matched_boxes and target_boxes [G,P,4], those of
    the pairs in `matches`. Boxes are normalised cxcywh.
    """

    logits: Tensor
    boxes: Tensor
    classes: Tensor
    matched_boxes: Tensor
    target_boxes: Tensor
    matches: Matches
    focal_alpha: float


Loss = Callable[[Assigned], Tensor]  # the sum over the batch, of each layer: [G]


# a loss, and its weight in the total unless an option says otherwise
LOSSES: Registry[tuple[Loss, float]] = Registry("loss", __package__, {})


def register_loss(name: str, *, coefficient: float = 1.0) -> Callable[[Loss], Loss]:
    """Return a decorator that adds a loss; those of the paper are always on, others if named."""

    def register(function: Loss) -> Loss:
        LOSSES.register(name)((function, coefficient))
        return function

    return register


@register_loss("loss_ce")
def classification(assigned: Assigned) -> Tensor:
    """Focal loss of all queries: most see background, which cross-entropy would learn alone.

    Every class is a question of its own. Unlike DETR's softmax, it needs no class for "no object":
    of background, all are false (Sec. 5).
    """
    focal: Tensor = sigmoid_focal_loss(
        assigned.logits, assigned.classes, alpha=assigned.focal_alpha
    )
    return focal.sum((1, 2, 3))


@register_loss("loss_bbox")
def box_distance(assigned: Assigned) -> Tensor:
    """L1 distance of matched boxes (DETR, Sec. 3.1): a few pixels weigh more on a small box."""
    return (assigned.matched_boxes - assigned.target_boxes).abs().sum((1, 2))


@register_loss("loss_giou")
def box_overlap(assigned: Assigned) -> Tensor:
    """GIoU loss of matched boxes, which does not depend on the size (DETR, Sec. 3.1)."""
    matched = box_convert(assigned.matched_boxes, "cxcywh", "xyxy")
    target = box_convert(assigned.target_boxes, "cxcywh", "xyxy")
    return (1 - generalized_iou(matched, target)).sum(1)


class SetCriterion:
    """Match predictions with targets, then sum up their losses (Sec. 4, DETR Sec. 3.1).

    `weights` maps registered losses to their coefficients.
    """

    def __init__(
        self, matcher: HungarianMatcher, *, weights: Mapping[str, float], focal_alpha: float = 0.25
    ) -> None:
        self.matcher = matcher
        self.weights = dict(weights)
        self.losses = {name: LOSSES[name][0] for name in weights}
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
        groups = outputs["groups"]
        padded = pad_targets(targets, groups[0].logits.device)
        own_boxes = sum(padded.counts)
        divisor = max(own_boxes, 1) if num_boxes is None else num_boxes
        supervised = [(g, g.targets(padded) if g.targets else padded) for g in groups]
        unmatched = [(g.logits, g.boxes, t) for g, t in supervised if g.matches is None]
        found = iter(self.matcher(unmatched))
        matches = [next(found) if g.matches is None else g.matches for g in groups]
        losses: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        for (group, own), matched in zip(supervised, matches, strict=True):
            layers = [*(f"_{i}" for i in range(len(group.logits) - 1)), ""]
            assigned = self._assign(group, own, matched)
            for name, loss in self.losses.items():
                values = loss(assigned) / (divisor * group.divisor)
                for layer, value in zip(layers, values, strict=True):
                    losses[f"{name}{group.name}{layer}"] = value
                    weighted.append(self.weights[name] * value)
        error = class_error(groups[0].logits[-1], padded, matches[0]) * (own_boxes / divisor)
        return {"loss": torch.stack(weighted).sum(), **losses, "class_error": error}

    def weight(self, name: str) -> float | None:
        """Return the coefficient of a loss of any layer, None for what is only reported."""
        known = [base for base in self.weights if f"{name}_".startswith(f"{base}_")]
        return self.weights[max(known, key=len)] if known else None

    def _assign(self, group: GroupOutput, targets: PaddedTargets, matches: Matches) -> Assigned:
        """Put predictions beside their targets."""
        exact = torch.promote_types(group.logits.dtype, torch.float32)
        logits, boxes = group.logits.to(exact), group.boxes.to(exact)
        layer = torch.arange(len(logits), device=logits.device)[:, None]  # [G,1]
        labels = targets.labels[matches.image, matches.target]  # [G,P]
        classes = torch.zeros_like(logits)
        classes[layer, matches.image, matches.query, labels] = 1.0
        return Assigned(
            logits=logits,
            boxes=boxes,
            classes=classes,
            matched_boxes=boxes[layer, matches.image, matches.query],
            target_boxes=targets.boxes[matches.image, matches.target].to(exact),
            matches=matches,
            focal_alpha=self.focal_alpha,
        )


@torch.no_grad()
def class_error(logits: Tensor, targets: PaddedTargets, matches: Matches) -> Tensor:
    """Return the percentage of matched queries of the last layer with a wrong best class.

    Shape: logits [N,Q,classes]; 0 where nothing is matched.
    """
    best = logits[matches.image, matches.query[-1]].argmax(-1)
    actual = targets.labels[matches.image, matches.target[-1]]
    wrong = (best != actual).sum().to(torch.float32)
    return 100 * wrong / max(len(matches.image), 1)
