"""How boxes lie to each other, as attention may see it (Relation-DETR, arXiv 2407.11699)."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.heads import MLP
from models.initial_values import start_at_zero
from models.layers import ExactLinear, sine_embedding

# N batch, Q and R boxes, H heads.

_EPSILON = 1e-5
_SYMMETRIC_DIMS = 32  # sines and cosines of each number
RELATED = 4 * _SYMMETRIC_DIMS
_PAIRS = 2**18  # whose embeddings are in memory at once: 64 MB for 64 numbers of each


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


def relation_bias(project: nn.Module, a: Tensor, b: Tensor, *, dims: int, scale: float) -> Tensor:
    """Return what `project` makes of embedded relations, one number for each head.

    Nothing is learned through the boxes. Many pairs are worked on in parts, whose embeddings are
    computed again in the backward pass: all of 900 queries would take 200 MB for an image.

    Shape: a [N,Q,4], b [N,R,4], cxcywh; project [...,4 dims] -> [...,H]; returns [N,H,Q,R].
    """
    a, b = a.detach(), b.detach()

    def of_rows(rows: Tensor, columns: Tensor) -> Tensor:
        embedded = embedded_relations(rows, columns, dims, scale=scale)
        output: Tensor = project(embedded).permute(0, 3, 1, 2)
        return output

    if not isinstance(b.shape[0], int):  # exported for batches of any size
        return of_rows(a, b)
    parts = torch.split(a, max(1, _PAIRS // (b.shape[0] * b.shape[1])), dim=1)
    if len(parts) == 1:
        return of_rows(a, b)
    if not torch.is_grad_enabled():
        return torch.cat([of_rows(part, b) for part in parts], dim=2)
    computed = [
        checkpoint(of_rows, part, b, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]
    return torch.cat(computed, dim=2)


def symmetric_bias(project: nn.Module, boxes: Tensor, attending: int | None = None) -> Tensor:
    """Return a bias that is the same in both directions (MDS-DETR, arXiv 2605.23507).

    `attending`: how many boxes, the last, are those of attending queries; by default all.

    Shape: boxes [N,R,4], cxcywh; project [...,`RELATED`] -> [...,H]; returns [N,H,Q,R].
    """
    if attending is None or attending == boxes.shape[1]:
        bias = relation_bias(project, boxes, boxes, dims=_SYMMETRIC_DIMS, scale=1.0)
        return 0.5 * (bias + bias.transpose(2, 3))
    rows = boxes[:, -attending:]
    there = relation_bias(project, rows, boxes, dims=_SYMMETRIC_DIMS, scale=1.0)
    back = relation_bias(project, boxes, rows, dims=_SYMMETRIC_DIMS, scale=1.0)
    return 0.5 * (there + back.transpose(2, 3))


class BoxBias(nn.Module):
    """What a decoder layer's attention gains from boxes of the layers before it: the contract."""

    last_layer_alone = False

    def forward(self, before: Tensor, now: Tensor) -> Tensor:
        """Return the bias of each pair; of the boxes `now`, the last are the attending queries'.

        Shape: before [N,Q,4], the attending queries' boxes; now [N,R,4] -> [N,H,Q,R].
        """
        raise NotImplementedError


class RelationBias(BoxBias):
    """The bias of Relation-DETR, in every layer but the first (Sec. 4.2).

    It is never negative: a query may be drawn towards another, and is never kept away.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Sequential(ExactLinear(64, n_heads), nn.ReLU())

    def forward(self, before: Tensor, now: Tensor) -> Tensor:
        """Shape: before [N,Q,4]; now [N,R,4] -> [N,H,Q,R]."""
        return relation_bias(self.pos_proj, before, now, dims=16, scale=100.0)


class SymmetricRelationBias(BoxBias):
    """What MDS-DETR's last layer knows of boxes, for the last layer of any decoder.

    It depends on the boxes that the layer before found, alike for both of a pair, and may be
    negative. At first it is 0.
    """

    last_layer_alone = True

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.relation = MLP(RELATED, RELATED, n_heads, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it 0 for all boxes."""
        start_at_zero(self.relation)

    def forward(self, before: Tensor, now: Tensor) -> Tensor:
        """Shape: before [N,Q,4]; now [N,R,4], what the layer before found -> [N,H,Q,R]."""
        return symmetric_bias(self.relation, now, before.shape[1])
