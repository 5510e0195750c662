"""Compilation of the detector by torch.compile."""

from collections.abc import Callable
from typing import Any

from torch._dynamo import config as dynamo

from models.deformable_detr import DeformableDETR

_SHAPES = 512  # sizes of batches, once for training and once for evaluation; PyTorch's limit is 8


def compile_model(model: DeformableDETR, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the whole forward pass in place; state-dict keys stay as they are.

    It is one graph without breaks: what cannot be compiled is an error, never a silent fallback.
    Level sizes are constants of the graph, so that each size of batch is compiled once, for
    training and for evaluation (a minute or more for ResNet-50): let `util.batch.pad_images`
    round sizes up, to a multiple of 128 for instance. PyTorch's limit on the number of graphs,
    past which it would stop compiling, is raised for the process; past ours it raises an error.
    """
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, _SHAPES)
    dynamo.accumulated_cache_size_limit = max(dynamo.accumulated_cache_size_limit, _SHAPES)
    model.compile(fullgraph=True, dynamic=False, backend=backend)
