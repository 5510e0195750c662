"""Groups of object queries: what they start from, what they predict, and how they learn."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from models.levels import FeatureLevels, grid_centres
from models.matcher import Matches, PaddedTargets

# G prediction layers, N batch, S tokens, Q queries, C width.

TargetsOf = Callable[[PaddedTargets], PaddedTargets]
# Logits [G,N,Q,classes], boxes [G,N,Q,4] and their targets -> pairs.
Assign = Callable[[Tensor, Tensor, PaddedTargets], Matches]

MAX_LOGIT = 1e4  # far beyond the logit whose sigmoid is 1


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

    @property
    def one_to_one(self) -> bool:
        """Return whether each of the batch's objects gets one query, the cheapest."""
        return self.targets is None and self.matches is None and self.assign is None


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
    blocked: Tensor | None = None
    sees_detecting: bool = False
    learning: Learning = ONE_TO_ONE
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
    learning: Learning = ONE_TO_ONE

    def learners(self) -> "GroupOutput":
        """Return the group without the queries of which nothing is learned."""
        size = self.learning.size
        if size is None:
            return self
        return replace(self, logits=self.logits[:, :, :size], boxes=self.boxes[:, :, :size])


class DetectorOutput(TypedDict, total=False):
    """Predictions. Boxes are normalised cxcywh relative to the unpadded image.

    `pred_logits` [N,Q,classes] and `pred_boxes` [N,Q,4] are the detections: the last decoder
    layer's. `groups` is what learns: first the queries that detect, with every supervised layer,
    then those of recipes, in training, then proposals of a two-stage encoder: "_enc", and in
    training those of recipes.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    groups: list[GroupOutput]


@dataclass(frozen=True)
class Proposals:
    """The boxes that a two-stage encoder predicts, one at each token (Sec. 4.2).

    Logits tell objects from background, by class 0 alone. With `num_learning`, they tell classes,
    and only so many proposals, the best, learn (DINO, arXiv 2203.03605).

    Shape: logits [N,S,classes]; box_logits [N,S,4], cxcywh in logit space; anchors [N,S,4], the
    boxes that these start from, cxcywh; padding_mask [N,S]; memory [N,S,C], 0 where a token has no
    usable anchor.
    """

    logits: Tensor
    box_logits: Tensor
    anchors: Tensor
    padding_mask: Tensor
    memory: Tensor
    num_learning: int | None = None

    def again(self, logits: Tensor, delta: Tensor) -> "Proposals":
        """Return what other heads propose. Shape: logits [N,S,classes]; delta [N,S,4]."""
        # infinite anchors become finite boxes: what is not finite is looked for in outputs
        box_logits = (delta + self.anchors.logit()).clamp(max=MAX_LOGIT)
        return replace(self, logits=logits, box_logits=box_logits)

    def ranked(self, count: int) -> Tensor:
        """Return the tokens with the best scores, the best first, or all. Shape: [N,count]."""
        if self.num_learning is None:
            # class 0 stands for "object" here: the encoder's targets all carry label 0
            scores = self.logits[..., 0].detach()
        else:
            scores = self.logits.detach().amax(-1)
        scores = scores.masked_fill(self.padding_mask, -math.inf)
        return scores.topk(min(count, scores.shape[1]), dim=1).indices

    def best(self, first: int, last: int) -> Tensor:
        """Return the proposals of these ranks by score; fewer where there are fewer tokens.

        They carry no gradient: the encoder learns from losses of its own.

        Shape: [N,last-first,4] cxcywh, fractions.
        """
        ranked = self.ranked(last)[..., None].expand(-1, -1, 4)
        boxes = self.box_logits.detach().gather(1, ranked)
        return boxes[:, first:].sigmoid()

    def output(
        self, name: str = "_enc", *, on_anchors: bool = False, weight: float = 1.0
    ) -> GroupOutput:
        """Return what the encoder learns from: objects and background or, if it tells, classes.

        With `on_anchors`, a token learns the object that its anchor lies best on, else the one
        that it predicts best.
        """
        logits, boxes, anchors = self.logits, self.box_logits.sigmoid(), self.anchors
        if self.num_learning is not None:
            tokens = self.ranked(self.num_learning)[..., None]
            logits, boxes, anchors = (
                values.gather(1, tokens.expand(-1, -1, values.shape[-1]))
                for values in (logits, boxes, anchors)
            )
        learning = Learning(
            targets=objects_of_one_class if self.num_learning is None else None,
            anchors=anchors if on_anchors else None,
            weight=weight,
        )
        return GroupOutput(name, logits[None], boxes[None], learning)


def objects_of_one_class(targets: PaddedTargets) -> PaddedTargets:
    """Return the targets with label 0, which stands for any object (Sec. 4.2)."""
    return replace(targets, labels=torch.zeros_like(targets.labels))


def token_proposals(levels: FeatureLevels) -> Tensor:
    """Return a box around each token, 0.05 * 2**level in size, in logit space (Appendix A.4).

    Coarse levels are for large objects: from the right size, a box is a small correction away.

    Shape: [N,S,4] cxcywh relative to the unpadded image; infinite where the token is padding or
    its centre lies within 1 % of the border, so that its box can never be moved.
    """
    ratios = levels.valid_ratios
    boxes = []
    for level, (height, width) in enumerate(levels.spatial_shapes):
        valid = (ratios[:, None, level] * levels.sizes[level]).round()  # [N,1,2], unpadded cells
        centre = grid_centres(height, width, ratios)[None] / valid
        boxes.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2.0**level)], dim=-1))
    proposals = torch.cat(boxes, dim=1)
    usable = ((proposals > 0.01) & (proposals < 0.99)).all(-1) & ~levels.padding_mask
    logits = torch.log(proposals / (1 - proposals))
    return logits.masked_fill(~usable[..., None], math.inf)
