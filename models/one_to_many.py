"""Several queries for an object: how they are assigned, and heads that propose other ones."""

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from models.heads import MLP
from models.initial_values import start_at_prior, start_at_zero
from models.layers import ExactLayerNorm, ExactLinear
from models.matcher import Matches, PaddedTargets, overlaps
from models.proposals import Proposals
from models.two_stage import TwoStageTransformer

# G prediction layers, N batch, Q queries, T targets of an image (padded to the longest).

MOST = 6  # queries for an object


class FurtherHeads(nn.Module):
    """A two-stage encoder's second opinion: where objects are, for queries that only train.

    It sees the same tokens, by the encoder's projection or, with `own_projection`, by one of its
    own. It has one score, object or background, or several for classes.
    """

    def __init__(self, d_model: int, *, scores: int = 1, own_projection: bool = False) -> None:
        super().__init__()
        if own_projection:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = ExactLayerNorm(d_model)
        self.score = ExactLinear(d_model, scores)
        self.box = MLP(d_model, d_model, 4, 3)
        # as the encoder's own heads start; boxes are the anchors
        if own_projection:
            nn.init.xavier_uniform_(self.enc_output.weight)
        start_at_prior(self.score.bias)
        start_at_zero(self.box)

    def forward(self, proposals: Proposals, transformer: TwoStageTransformer) -> Proposals:
        """Return what it proposes on the tokens of the encoder's own proposals."""
        projecting = self if hasattr(self, "enc_output") else transformer
        output = projecting.enc_output_norm(projecting.enc_output(proposals.memory))
        return proposals.again(self.score(output), self.box(output))


@torch.no_grad()
def assign_by_quality(
    logits: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    *,
    threshold: float = 0.4,
    iou_weight: float = 0.7,
) -> Matches:
    """Assign the best queries to every object, up to six (MS-DETR, arXiv 2401.03989, Sec. 3.3).

    The quality of a query for an object is 0.7 IoU + 0.3 of its score for the object's class. A
    query that reaches the threshold for its best object is positive, and so is each object's best
    query, for the query's own best object. An object gets as many queries as have chosen it, at
    most six: its best ones, whatever they have chosen. So a query may stand for two objects; it
    then learns the class of the better one.

    Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4] cxcywh.
    """
    quality = _quality(logits, boxes, targets, iou_weight)  # [G,N,T,Q]
    layers, n, t, q = quality.shape
    device = logits.device
    counts = torch.tensor(targets.counts).to(device, non_blocking=True)
    real = torch.arange(t, device=device) < counts[:, None]  # [N,T]
    quality = quality.masked_fill(~real[..., None], -1.0)
    if t == 0 or q == 0:
        none = torch.zeros(layers, 0, dtype=torch.int64, device=device)
        return Matches(none[0], none, none)
    best, chosen = quality.max(dim=2)  # [G,N,Q], of each query
    positive = best >= threshold
    favourite = quality.argmax(dim=3)  # [G,N,T]
    wanted = torch.zeros(layers, n, q, device=device, dtype=torch.int64)
    wanted.scatter_add_(2, favourite, real.expand(layers, -1, -1).long())
    positive = positive | (wanted > 0)
    votes = torch.zeros(layers, n, t, device=device, dtype=torch.int64)
    votes.scatter_add_(2, chosen, positive.long())
    size = min(MOST, q)
    value, query = quality.topk(size, dim=3)  # [G,N,T,K]
    rank = torch.arange(size, device=device)
    pairs = (rank < votes[..., None]) & real[..., None]
    image = torch.arange(n, device=device)[:, None, None].expand(n, t, size)
    target = torch.arange(t, device=device)[:, None].expand(layers, n, t, size)
    learned = _first_best(value, query, pairs, q)
    return Matches(image.flatten(), *(x.flatten(1) for x in (query, target, pairs, learned)))


def _quality(logits: Tensor, boxes: Tensor, targets: PaddedTargets, iou_weight: float) -> Tensor:
    exact = torch.promote_types(logits.dtype, torch.float32)
    mine = box_convert(boxes.to(exact), "cxcywh", "xyxy")[:, :, None]
    wanted = box_convert(targets.boxes.to(exact), "cxcywh", "xyxy")[None, :, :, None]
    iou, _ = overlaps(mine, wanted)
    index = targets.labels[None, :, None].expand(*logits.shape[:3], -1)
    score = logits.to(exact).gather(3, index).sigmoid().transpose(2, 3)
    return iou_weight * iou + (1 - iou_weight) * score


def _first_best(value: Tensor, query: Tensor, pairs: Tensor, queries: int) -> Tensor:
    """Return which pair decides on the class of its query: the best, of equal ones the first.

    Shape: [G,N,T,K] each -> the same, bool.
    """
    layers, n, t, size = query.shape
    flat = query.flatten(2)
    worth = value.masked_fill(~pairs, -1.0).flatten(2)
    best = worth.new_full((layers, n, queries), -1.0)
    best = best.scatter_reduce(2, flat, worth, "amax")
    is_best = pairs.flatten(2) & (worth == best.gather(2, flat))
    order = torch.arange(t * size, device=query.device).expand(layers, n, -1)
    late = torch.full_like(best, t * size, dtype=torch.int64)
    first = late.scatter_reduce(2, flat, torch.where(is_best, order, t * size), "amin")
    return (is_best & (order == first.gather(2, flat))).reshape(layers, n, t, size)
