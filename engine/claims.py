"""Whether a file can hold the weights of the model that it describes."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from configs.schema import ModelConfig
from models.build import build_model
from util.errors import CheckpointError, UserError

_TIMES = 2  # the weights of the file: parts of a model may be missing in it
_SLACK = 50_000_000  # weights: a usual model, of which a file may hold next to nothing
_HEAD = "class_embed.0.bias"
_SMALL_BACKBONE = "resnet18"


def check_claims(
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    source: str,
    *,
    recipes: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a file that describes a far larger model than its weights are of.

    A model is built before weights are put in it: without this, a small file could name one that
    takes all memory. It is laid out on PyTorch's meta device, whose tensors are shapes alone.

    Raises:
        CheckpointError: it does.
        ConfigError: there is no such model.
    """
    head = state_dict.get(_HEAD)
    num_classes = len(head) if isinstance(head, Tensor) and head.dim() == 1 else 1
    check_size(_layout(config, num_classes, recipes), state_dict, source)


def check_size(stated: int, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuse a file that describes a model of `stated` weights, and holds far fewer.

    Raises:
        CheckpointError: it does.
    """
    held = _held(state_dict)
    if stated > _TIMES * held + _SLACK:
        raise CheckpointError(
            f"{source}: describes a model of {stated:,} weights, but holds {held:,}. "
            "Use another checkpoint, or the weights alone."
        )


def _layout(config: ModelConfig, num_classes: int, recipes: Mapping[str, Any] | None) -> int:
    """Return how many weights a model has; 0 if it cannot be laid out without memory.

    Of a backbone that cannot, whose size its library limits, the rest of the model is counted.
    """
    small = replace(
        config, backbone=_SMALL_BACKBONE, drop_path=0.0, dat_stride=1, dat_grid="corrected"
    )
    for candidate in (config, small):
        with _unless_values_are_needed(), torch.device("meta"):
            model = build_model(candidate, num_classes=num_classes, recipes=recipes)
            return sum(tensor.numel() for tensor in model.state_dict().values())
    return 0


@contextlib.contextmanager
def _unless_values_are_needed() -> Iterator[None]:
    """Ignore what a constructor raises only because tensors on this device have no values."""
    try:
        yield
    except (UserError, RuntimeError) as error:
        if "meta" not in str(error):
            raise


def _held(state_dict: Mapping[str, Tensor]) -> int:
    """Return how many numbers there are; tensors may share them, or repeat one many times."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // tensor.itemsize
        for tensor in state_dict.values()
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())
