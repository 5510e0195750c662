"""Other matching costs of a class than that of the focal loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.matcher import HungarianMatcher

_TIE = 1e-6  # part of the usual cost: far below what a score times IoU ** 4 tells apart


class PositionModulatedMatcher(HungarianMatcher):
    """With the score, the box must be right, too (Stable-DINO, arXiv 2304.04742, Eq. 9)."""

    def total(
        self, score: Tensor, distance: Tensor, iou: Tensor, giou: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """See `HungarianMatcher`."""
        score = score * _best_is_1((giou + 1) / 2, counts).sqrt()
        return super().total(score, distance, iou, giou, counts)


class HighOrderMatcher(HungarianMatcher):
    """Late in the training, the score times IoU ** 4 is what counts.

    That is once `progress` reaches `high_order_from` (Rank-DETR, arXiv 2310.08854, Sec. 3.3). A
    millionth of the usual cost decides among queries that hardly overlap an object: rounding
    would, and differently for every way in which a batch is split.
    """

    def __init__(self, *, high_order_from: float, **costs: float) -> None:
        """`costs` are those of `HungarianMatcher`, for the time before."""
        super().__init__(**costs)
        self.high_order_from = high_order_from

    def total(
        self, score: Tensor, distance: Tensor, iou: Tensor, giou: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """See `HungarianMatcher`."""
        usual = super().total(score, distance, iou, giou, counts)
        return usual if self.progress < self.high_order_from else _TIE * usual - score * iou**4


class ProbabilityMatcher(HungarianMatcher):
    """The score itself, in place of what its loss would be (DETR, arXiv 2005.12872, Sec. 3.1)."""

    def total(
        self, score: Tensor, distance: Tensor, iou: Tensor, giou: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """See `HungarianMatcher`."""
        return -self.cost_class * score + self.cost_bbox * distance - self.cost_giou * giou


def _best_is_1(quality: Tensor, counts: Sequence[int]) -> Tensor:
    """Scale the qualities [G,N,Q,T] of every image so that the best is 1."""
    real = torch.arange(quality.shape[3]) < torch.tensor(counts)[:, None, None]  # [N,1,T]
    padded = quality.masked_fill(~real.to(quality.device, non_blocking=True), 0.0)
    best = padded.flatten(2).max(dim=2).values if padded.numel() else padded.sum((2, 3))
    return quality / best.clamp(min=torch.finfo(best.dtype).tiny)[..., None, None]
