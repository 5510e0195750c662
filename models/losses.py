"""Losses of matched predictions: functions that are registered by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from models.matcher import Matches
from util.box_ops import cxcywh_to_xyxy, generalized_iou
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


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss, and its weight in the total unless an option says otherwise."""

    function: Loss
    coefficient: float


LOSSES: Registry[RegisteredLoss] = Registry("loss", __package__, {})


def register_loss(name: str, *, coefficient: float = 1.0) -> Callable[[Loss], Loss]:
    """Return a decorator that adds a loss; those of the paper are always on, others if named."""

    def register(function: Loss) -> Loss:
        LOSSES.register(name)(RegisteredLoss(function, coefficient))
        return function

    return register


@register_loss("loss_ce")
def classification(assigned: Assigned) -> Tensor:
    """Focal loss of all queries: most see background, which cross-entropy would learn alone."""
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
    matched, target = map(cxcywh_to_xyxy, (assigned.matched_boxes, assigned.target_boxes))
    return (1 - generalized_iou(matched, target)).sum(1)
