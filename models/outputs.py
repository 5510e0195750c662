"""What the detector predicts, and how each group of predictions learns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from models.matcher import Matches, PaddedTargets

# G prediction layers, N batch, Q predictions, P matched pairs.

TargetsOf = Callable[[PaddedTargets], PaddedTargets]


def objects_of_one_class(targets: PaddedTargets) -> PaddedTargets:
    """Return the targets with label 0: proposals only tell objects from background (Sec. 4.2)."""
    return replace(targets, labels=torch.zeros_like(targets.labels))


@dataclass(frozen=True)
class GroupOutput:
    """Predictions of one group in every supervised layer, and how they learn.

    `name` is the suffix of the group's losses, empty for the queries that detect. `targets` turns
    the batch's targets into the group's if these are others, `matches` are its pairs if they are
    known beforehand (their layer axis may be 1), and its losses are divided by `divisor` as well.

    Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4], normalised cxcywh of the unpadded image.
    """

    name: str
    logits: Tensor
    boxes: Tensor
    targets: TargetsOf | None = None
    matches: Matches | None = None
    divisor: float = 1.0


class DetectorOutput(TypedDict, total=False):
    """Predictions. Boxes are normalised cxcywh relative to the unpadded image.

    `pred_logits` [N,Q,classes] and `pred_boxes` [N,Q,4] are the detections: the last decoder
    layer's. `groups` is what learns: first the queries that detect, with every supervised layer,
    then those of recipes, in training, then a two-stage encoder's proposals, "_enc".
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    groups: list[GroupOutput]
