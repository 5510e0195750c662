"""Activation checkpointing: less memory for one more forward pass of the parts chosen."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, *args: Any, enabled: bool) -> Any:
    """Call a module; if `enabled`, keep its arguments alone for the backward pass."""
    if not (enabled and torch.is_grad_enabled()):
        return module(*args)
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    if not norms:
        return checkpoint(module, *args, use_reentrant=False)
    contexts = partial(_forward_and_again, norms)
    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)


def _forward_and_again(
    norms: list[_BatchNorm],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(norms)


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Keep the second forward pass from adding the batch to the running statistics once more."""
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
