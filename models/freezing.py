"""Parts of a detector that training leaves as they are."""

from collections.abc import Collection

from torch import nn

from models.deformable_detr import DeformableDETR
from util.errors import ConfigError


def frozen_parts(model: DeformableDETR, part: str) -> list[nn.Module]:
    """Return the modules that a choice of `--freeze` keeps as they are, heads aside.

    "encoder" has all that comes before the decoder, "all_but_heads" what comes before the heads.
    As nothing that learns comes before what is frozen, autograd records nothing of it.
    """
    if part == "none":
        return []
    if part == "backbone":
        return [model.backbone[0]]
    before_decoder = [model.backbone, model.input_proj]
    if part == "encoder":
        return [*before_decoder, model.transformer.encoder]
    queries = [] if model.query_embed is None else [model.query_embed]
    return [*before_decoder, *queries, model.transformer]


def freeze(model: DeformableDETR, part: str, *, fresh: Collection[str] = ()) -> None:
    """Let a part of the model need no gradient, and stay in evaluation mode: no dropout.

    `part`: "none", "backbone", "encoder" or "all_but_heads", see `frozen_parts`. `fresh`: names of
    the parameters that have random values.

    Raises:
        ConfigError: one of these would stay random.
    """
    parts = frozen_parts(model, part)
    # a refining decoder holds the box heads too
    heads = {id(p) for m in (model.class_embed, model.bbox_embed) for p in m.parameters()}
    frozen = {id(p) for module in parts for p in module.parameters()} - heads
    if part == "encoder":
        frozen.add(id(model.transformer.level_embed))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in frozen:
            if name in fresh:
                raise ConfigError(
                    f"--freeze {part}: expected trained weights in what is frozen, but '{name}' "
                    "would stay random. Give --finetune weights of the same model, or freeze less."
                )
            parameter.requires_grad_(False)
    model.stay_in_evaluation(parts)
