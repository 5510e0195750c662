"""What a two-stage encoder proposes: a box and scores at every token (Sec. 4.2)."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.levels import FeatureLevels, grid_centres
from models.matcher import PaddedTargets
from models.queries import GroupOutput, Learning

# N batch, S tokens, Q queries, C width.

MAX_LOGIT = 1e4  # far beyond the logit whose sigmoid is 1


@dataclass(frozen=True)
class Proposals:
    """The boxes that a two-stage encoder predicts, one at each token (Sec. 4.2).

    Logits distinguish objects from background, by class 0 alone. With `num_learning`, they
    distinguish classes, and only that many proposals, the best, learn (DINO, arXiv 2203.03605).

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
        """Return what the encoder learns from: objects and background, or classes.

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
