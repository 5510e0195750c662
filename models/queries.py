"""Groups of object queries, and a two-stage model's proposals for them (Sec. 4.2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers import sine_embedding
from models.levels import FeatureLevels, grid_centres
from models.matcher import Matches
from models.outputs import TargetsOf

# N batch, S tokens, Q queries, C width.


@dataclass(frozen=True)
class QueryGroup:
    """Queries that attend to each other alone, and how they learn, see `outputs.GroupOutput`.

    The decoder works on all groups at once, but no group sees another: what the queries that
    detect compute does not depend on the groups that only train.

    Shape: content, position [N,Q,C]; reference [N,Q,2 or 4], fractions, with as many numbers as
    the other groups have; blocked [Q,Q], True where a query (row) must not attend to another.
    """

    name: str
    content: Tensor
    position: Tensor
    reference: Tensor
    blocked: Tensor | None = None
    targets: TargetsOf | None = None
    matches: Matches | None = None
    divisor: float = 1.0


@dataclass(frozen=True)
class Proposals:
    """The boxes that a two-stage encoder predicts, one at each token.

    Shape: logits [N,S,classes]; box_logits [N,S,4], cxcywh in logit space; padding_mask [N,S].
    """

    logits: Tensor
    box_logits: Tensor
    padding_mask: Tensor

    def best(self, first: int, last: int) -> Tensor:
        """Return the proposals of these ranks by score; fewer where there are fewer tokens.

        They carry no gradient: the encoder learns from losses of its own.

        Shape: [N,last-first,4] cxcywh, fractions.
        """
        # class 0 stands for "object" here: the encoder's targets all carry label 0
        scores, boxes = self.logits[..., 0].detach(), self.box_logits.detach()
        return select_proposals(scores, boxes, self.padding_mask, last)[:, first:].sigmoid()


def token_proposals(levels: FeatureLevels) -> Tensor:
    """Return a box around each token, 0.05 * 2**level in size, in logit space.

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


def proposal_embedding(boxes: Tensor, dims: int) -> Tensor:
    """Embed cxcywh boxes by sines. Shape: [N,Q,4] in 0..1 -> [N,Q,4*dims]."""
    return sine_embedding(boxes * 2 * math.pi, dims).flatten(-2)


def select_proposals(scores: Tensor, boxes: Tensor, padding_mask: Tensor, count: int) -> Tensor:
    """Return the `count` best boxes, or all where there are fewer tokens.

    Shape: scores [N,S]; boxes [N,S,4]; padding_mask [N,S]; returns [N,min(count,S),4].
    """
    ranked = scores.masked_fill(padding_mask, -math.inf)
    best = ranked.topk(min(count, scores.shape[1]), dim=1).indices
    return boxes.gather(1, best[..., None].expand(-1, -1, 4))
