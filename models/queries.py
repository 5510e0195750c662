"""Two-stage queries: proposals from the encoder's memory (Deformable DETR, Sec. 4.2)."""

import math

import torch
from torch import Tensor

from models.layers import sine_embedding
from models.levels import FeatureLevels, grid_centres

# N batch, S tokens, Q queries, C width.


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
