"""How boxes lie to each other, as attention may see it (Relation-DETR, arXiv 2407.11699)."""

import torch
from torch import Tensor

from models.layers import sine_embedding

_EPSILON = 1e-5


def box_relations(a: Tensor, b: Tensor) -> Tensor:
    """Return distances and ratios of sizes, in logarithms, of every box to every other (Eq. 2).

    Shape: a [N,Q,4], b [N,R,4], cxcywh -> [N,Q,R,4]: ln(|dx| / w + 1) and ln(|dy| / h + 1), with
    the sizes of the first box, then ln(w / w') and ln(h / h').
    """
    a, b = a[:, :, None], b[:, None]
    size, other = a[..., 2:] + _EPSILON, b[..., 2:] + _EPSILON
    distance = torch.log((a[..., :2] - b[..., :2]).abs() / size + 1)
    return torch.cat([distance, torch.log(size / other)], dim=-1)


def embedded_relations(a: Tensor, b: Tensor, dims: int, *, scale: float) -> Tensor:
    """Return sines and cosines of relations, `dims` of each number. Shape: [N,Q,R,4 dims]."""
    return sine_embedding(box_relations(a, b) * scale, dims).flatten(-2)
