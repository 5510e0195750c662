"""Losses as pure functions."""

import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float, gamma: float = 2.0
) -> Tensor:
    """Return the focal loss of each logit, not reduced (arXiv 1708.02002, Eq. 5).

    Shape: logits, targets [...], targets 0 or 1; returns [...].
    """
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = probability + targets - 2 * probability * targets  # 1 - p_t
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return balance * missed**gamma * cross_entropy
