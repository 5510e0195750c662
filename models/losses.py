"""Losses by name: how a file adds one. Those of the paper are in `models/criterion.py`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from util.registry import Registry

CLASSIFICATION = "loss_ce"  # its name, whichever it is

Loss = Callable[..., Tensor]  # takes an `Assigned`; returns the sum over the batch, by layer: [G]


class RegisteredLoss(NamedTuple):
    """A loss, and its coefficient unless an option gives another."""

    function: Loss
    coefficient: float


LOSSES: Registry[RegisteredLoss] = Registry(
    "loss", __package__, {"loss_bbox": ".criterion", "loss_giou": ".criterion"}
)
_OTHERS = ("vfl", "mal", "ia_bce", "position_supervised", "giou_focal")
CLASS_LOSSES: Registry[RegisteredLoss] = Registry(
    "cls_loss",
    __package__,
    {
        "focal": ".criterion",
        **dict.fromkeys(_OTHERS, ".class_losses"),
        "softmax": ".softmax",
    },
)


def register_loss(name: str, *, coefficient: float = 1.0) -> Callable[[Loss], Loss]:
    """Return a decorator that adds a loss; those of the paper are always on, others if named."""

    def register(function: Loss) -> Loss:
        LOSSES.register(name)(RegisteredLoss(function, coefficient))
        return function

    return register


def class_loss(name: str, *, coefficient: float) -> Callable[[Loss], Loss]:
    """Return a decorator that adds a classification loss."""

    def register(function: Loss) -> Loss:
        CLASS_LOSSES.register(name)(RegisteredLoss(function, coefficient))
        return function

    return register
