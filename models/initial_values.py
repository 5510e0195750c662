"""How prediction heads start: with low scores, and with outputs of 0."""

import math

from torch import Tensor, nn

from models.heads import MLP

_PRIOR = 0.01


def start_at_prior(bias: Tensor) -> None:
    """Set the bias of class logits such that scores start at 0.01.

    Nearly all queries see background: scores that start so low keep the sum of their losses from
    drowning the rest (RetinaNet, arXiv 1708.02002, Sec. 4.1).
    """
    nn.init.constant_(bias, -math.log((1 - _PRIOR) / _PRIOR))


def start_at_zero(mlp: MLP) -> None:
    """Set the last layer such that all outputs start at 0."""
    for parameter in mlp.layers[-1].parameters():
        nn.init.zeros_(parameter)
