"""Groups of object queries: what they start from, what they predict, and how they learn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

from torch import Tensor, nn

from models.matcher import Matches, PaddedTargets

# G prediction layers, N batch, T tokens, Q queries, C width.

TargetsOf = Callable[[PaddedTargets], PaddedTargets]
# Logits [G,N,Q,classes], boxes [G,N,Q,4] and their targets -> pairs.
Assign = Callable[[Tensor, Tensor, PaddedTargets], Matches]


@dataclass(frozen=True)
class Learning:
    """How a group of queries learns: by default, one query for each object, the cheapest one.

    `targets` turns the batch's targets into the group's if these are others. `matches` are its
    pairs if they are known beforehand (their layer axis may be 1); else `assign` finds them if it
    is given. `anchors` [N,Q,4] cxcywh are matched in place of predicted boxes, and classes then do
    not count. Of several equal `parts` of the group's queries, each is matched by itself. Losses
    are divided by `divisor` as well, and their coefficients are multiplied by `weight`, and by
    `factors`, by name. Of queries beyond the first `size`, if it is given, nothing is learned.
    """

    targets: TargetsOf | None = None
    matches: Matches | None = None
    assign: Assign | None = None
    anchors: Tensor | None = None
    parts: int = 1
    divisor: float = 1.0
    weight: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    size: int | None = None


ONE_TO_ONE = Learning()


class Route(NamedTuple):
    """What a group has for itself in a decoder layer; None for what it shares with the others.

    Its queries attend to `tokens` [2,T,C], contents and positions, besides each other. `norm`
    follows that attention, and `feed_forward` is the block without residual connection and norm.
    `aside` reads the queries after cross-attention; what it returns goes no further than
    `DecoderOutput.aside`.
    """

    tokens: Tensor | None = None
    norm: nn.Module | None = None
    feed_forward: nn.Module | None = None
    aside: nn.Module | None = None


@dataclass(frozen=True)
class QueryGroup:
    """Queries that attend to each other, and how they learn.

    The decoder works on all groups at once, but no group sees one that only trains: what the
    queries that detect compute does not depend on the others. With `sees_detecting`, a group
    attends to those as well.

    `name` is the suffix of the group's losses, empty for the queries that detect. Of several equal
    `parts` of the queries, none sees another. `routes` has an entry for each decoder layer, unless
    the group shares all of them. `encoder` is what the encoder predicted where it chose the queries
    and is to learn.

    Shape: content, position [N,Q,C]; reference [N,Q,2 or 4], fractions, with as many numbers as
    the other groups have; blocked [Q,Q], True where a query (row) must not attend to another.
    """

    name: str
    content: Tensor
    position: Tensor
    reference: Tensor
    learning: Learning
    blocked: Tensor | None = None
    sees_detecting: bool = False
    parts: int = 1
    routes: Sequence[Route] = ()
    encoder: "GroupOutput | None" = None


@dataclass(frozen=True)
class GroupOutput:
    """Predictions of one group in every supervised layer, and how they learn.

    Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4], normalised cxcywh of the unpadded image.
    """

    name: str
    logits: Tensor
    boxes: Tensor
    learning: Learning


class DetectorOutput(TypedDict, total=False):
    """Predictions. Boxes are normalised cxcywh relative to the unpadded image.

    `pred_logits` [N,Q,classes] and `pred_boxes` [N,Q,4] are the detections: the last decoder
    layer's. `groups` is what learns: first the queries that detect, with every supervised layer,
    then those of recipes, in training, then proposals of a two-stage encoder: "_enc", and in
    training those of recipes. `image_losses` [N] by name are further losses of each image, of which
    the mean over images is learned.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    groups: list[GroupOutput]
    image_losses: dict[str, Tensor]
