"""DETR's classification: a softmax over the classes and "no object".

DETR, arXiv 2005.12872, Sec. 3.1. Deformable DETR has a sigmoid for each class instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.criterion import Assigned, SetCriterion
from models.layers import ExactLinear
from models.losses import CLASSIFICATION, class_loss
from models.matcher import HungarianMatcher
from models.queries import DetectorOutput
from util.batch import EffectiveBatch, Target

# G prediction layers, N batch, Q predictions, K classes.


class SoftmaxHead(ExactLinear):
    """Scores of which all classes and "no object", the last one, add up to 1.

    It returns the logits of these scores, as other heads do: their sigmoid is the softmax. Rows of
    `weight` belong to classes, as in other heads, and those of DETR but its last one.
    """

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__(in_features, classes)
        self.no_object = ExactLinear(in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [...,C] -> [...,K+1]."""
        return log_odds(torch.cat([super().forward(x), self.no_object(x)], dim=-1))


def log_odds(z: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the softmax p of `z`, exact for p near 1, too. Shape: [...,K]."""
    best = z.argmax(dim=-1, keepdim=True)
    is_best = torch.zeros_like(z, dtype=torch.bool).scatter(-1, best, True)
    log_p = z.log_softmax(-1)
    # others than the best have at most 1/2; 1 - p of the best is what the others have together
    others = torch.log1p(-log_p.masked_fill(is_best, -torch.inf).exp())
    rest = z.masked_fill(is_best, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.where(is_best, z - rest, log_p - others)


def weighted_cross_entropy(assigned: Assigned, eos_coef: float) -> Tensor:
    """Return the cross-entropy of all queries; those without an object weigh `eos_coef`.

    Nearly all queries have none, and would be all that is learned. The last logit is that of "no
    object".
    """
    log_p, y = F.logsigmoid(assigned.logits), assigned.classes
    nothing = 1 - y.sum(-1)
    return -((y * log_p).sum(-1) + eos_coef * nothing * log_p[..., -1]).sum((1, 2))


@class_loss("softmax", coefficient=1.0)
def cross_entropy(assigned: Assigned) -> Tensor:
    """Cross-entropy with DETR's weight of "no object", as a sum (DETR, Sec. 3.1)."""
    return weighted_cross_entropy(assigned, 0.1)


class SoftmaxCriterion(SetCriterion):
    """The cross-entropy is a mean of all queries of the effective batch, each by its weight.

    The sum of weights is that of a batch of which no image has more objects than queries.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        *,
        weights: Mapping[str, float],
        eos_coef: float,
        **options: Any,
    ) -> None:
        """`weights` and `options` are those of `SetCriterion`."""
        super().__init__(matcher, weights=weights, **options)
        self.eos_coef = eos_coef
        self.losses[CLASSIFICATION] = self._mean
        self._objects, self._images = 0, 0

    def __call__(
        self,
        outputs: DetectorOutput,
        targets: Sequence[Target],
        num_boxes: float | None = None,
    ) -> dict[str, Tensor]:
        """See `SetCriterion`."""
        whole = self.whole if num_boxes is not None else None
        whole = whole or EffectiveBatch.of(targets)
        self._objects, self._images = whole.boxes, whole.images
        return super().__call__(outputs, targets, num_boxes)

    def _mean(self, assigned: Assigned) -> Tensor:
        """Return the sum that gives the mean once it is divided by the number of objects."""
        queries = self._images * assigned.logits.shape[2]
        weight = self._objects + self.eos_coef * (queries - self._objects)
        loss = weighted_cross_entropy(assigned, self.eos_coef)
        return loss * (max(self._objects, 1) / weight)
