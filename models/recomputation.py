"""Activations that are computed twice instead of being kept."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *args: Any) -> Any:
    """Call a module and keep its arguments alone for the backward pass.

    What lies between is computed once more there: less memory for another forward pass.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    if not norms:
        return checkpoint(module, *args, use_reentrant=False)

    @contextmanager
    def statistics_kept() -> Iterator[None]:
        """Keep the second forward pass from adding the batch to the statistics once more."""
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    return checkpoint(
        module,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), statistics_kept()),  # of the first pass, the second
    )
