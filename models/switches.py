"""What is set on a built detector: frozen parts, compilation, activation checkpointing."""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch._dynamo import config as dynamo

from models.deformable_detr import DeformableDETR
from util.errors import ConfigError, nearest_hint


def freeze(model: DeformableDETR, part: str, *, fresh: Collection[str] = ()) -> None:
    """Freeze a part of the model: no gradients, and evaluation mode, thus no dropout.

    `part`: "none", "backbone", "encoder" (all that comes before the decoder) or "all_but_heads"
    (all that comes before the heads, the queries of recipes too). As nothing that learns comes
    before what is frozen, autograd records nothing of it. `fresh`: names of the parameters that
    have random values.

    Raises:
        ConfigError: one of these would stay random.
    """
    before_decoder = [model.backbone, model.input_proj, model.neck]
    queries = [] if model.query_embed is None else [model.query_embed]
    parts: list[nn.Module] = {
        "none": [],
        "backbone": [model.backbone[0]],
        "encoder": [*before_decoder, model.transformer.encoder],
        "all_but_heads": [*before_decoder, *queries, model.transformer, model.recipes],
    }[part]
    # a refining decoder holds the box heads too
    heads = {id(p) for m in (model.class_embed, model.bbox_embed) for p in m.parameters()}
    frozen = {id(p) for module in parts for p in module.parameters()} - heads
    if part == "encoder":
        frozen.add(id(model.transformer.level_embed))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in frozen:
            if name in fresh:
                raise ConfigError(
                    f"freeze {part}: '{name}' would stay random: the weights given lack it. "
                    "Give `finetune` weights of the same model, or freeze less."
                )
            parameter.requires_grad_(False)
    model.stay_in_evaluation(parts)


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


def set_checkpointing(model: DeformableDETR, parts: Collection[str]) -> None:
    """Enable activation checkpointing for these of "backbone", "encoder" and "decoder" alone.

    They drop their activations and compute them again in the backward pass. Gradients are the same
    to the last bit, dropout included.

    Raises:
        ConfigError: there is no such part.
    """
    modules: dict[str, Any] = {
        "backbone": model.backbone[0],
        "encoder": model.transformer.encoder,
        "decoder": model.transformer.decoder,
    }
    for part in parts:
        if part not in modules:
            raise ConfigError(
                f"activation_checkpointing: the model has no part '{part}'. "
                f"{nearest_hint(part, modules)}"
            )
    for part, module in modules.items():
        module.checkpointing = part in parts
