"""DETR's weights, of its own repository and of Hugging Face transformers, under our keys."""

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.weights.hugging_face import common_options, with_other_names
from models.weights.official import complete_heads
from models.weights.rename import renamer
from util.errors import CheckpointError

# What shapes do not show, or what shapes of Deformable DETR show.
OPTIONS: Mapping[str, Any] = {
    "encoder_attn": "dense",
    "decoder_attn": "dense",
    "input_norm": "none",
    "position_offset": 0.0,
    "decoder_norm": True,
    "scores": "softmax",
    "num_feature_levels": 1,
    "with_box_refine": False,
    "two_stage": False,
}
SIGNS = (
    "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
    "transformer.encoder.layers.0.self_attn.in_proj_weight",
    "class_embed.weight",
    "bbox_embed.layers.0.weight",
    "input_proj.weight",
)
# Theirs -> ours; # is one number. In a decoder layer of ours, norm1 follows the look at the image.
_MODULES = {
    "transformer.encoder.layers.#.self_attn": "transformer.encoder.layers.#.self_attn.attn",
    "transformer.decoder.layers.#.multihead_attn": "transformer.decoder.layers.#.cross_attn",
    "transformer.decoder.layers.#.norm1": "transformer.decoder.layers.#.norm2",
    "transformer.decoder.layers.#.norm2": "transformer.decoder.layers.#.norm1",
    "transformer": "transformer",
    "class_embed": "class_embed.0",
    "bbox_embed": "bbox_embed.0",
    "input_proj": "input_proj.0.0",
    "query_embed": "query_embed",
    "backbone": "backbone",
}
_FEED_FORWARD = {"linear1": "fc1", "linear2": "fc2"}
_NORMED = {"norm1": "self_attn_layer_norm"}
_PROJECTIONS = [f"{part}_proj" for part in ("q", "k", "v", "out")]
# Those of the repository -> those of Hugging Face.
_HUGGING_FACE = {
    **{f"transformer.encoder.layers.#.{original}": f"model.encoder.layers.#.{theirs}"
       for original, theirs in {
           **{f"self_attn.{part}": f"self_attn.{part}" for part in _PROJECTIONS},
           **_NORMED, **_FEED_FORWARD, "norm2": "final_layer_norm",
       }.items()},
    **{f"transformer.decoder.layers.#.{original}": f"model.decoder.layers.#.{theirs}"
       for original, theirs in {
           **{f"self_attn.{part}": f"self_attn.{part}" for part in _PROJECTIONS},
           **{f"multihead_attn.{part}": f"encoder_attn.{part}" for part in _PROJECTIONS},
           **_NORMED, **_FEED_FORWARD, "norm2": "encoder_attn_layer_norm",
           "norm3": "final_layer_norm",
       }.items()},
    "transformer.decoder.norm": "model.decoder.layernorm",
    "class_embed": "class_labels_classifier",
    "bbox_embed": "bbox_predictor",
    "query_embed": "model.query_position_embeddings",
    "input_proj": "model.input_projection",
    "backbone.1.row_embed": "model.backbone.position_embedding.row_embeddings",
    "backbone.1.col_embed": "model.backbone.position_embedding.column_embeddings",
}  # fmt: skip


def from_detr(
    weights: Mapping[str, Tensor], args: argparse.Namespace | None, source: str
) -> dict[str, Tensor]:
    """Rename weights of DETR's repository.

    Raises:
        CheckpointError: a key belongs to no part of the detector, or norms precede attention.
    """
    if getattr(args, "pre_norm", False) or "transformer.encoder.norm.weight" in weights:
        raise CheckpointError(
            f"{source}: a DETR with norms before attention (pre_norm); only its usual form is "
            "supported. Use weights of detr-r50 or one of its kind."
        )
    rename = renamer(_MODULES)
    try:
        converted = {rename(key): tensor for key, tensor in weights.items()}
    except ValueError as error:
        raise CheckpointError(f"{source}: looks like DETR, but {error}.") from error
    for kind in ("weight", "bias"):  # the last row is "no object"
        rows = converted.pop(f"class_embed.0.{kind}")
        converted[f"class_embed.0.{kind}"] = rows[:-1]
        converted[f"class_embed.0.no_object.{kind}"] = rows[-1:]
    queries = converted["query_embed.weight"]
    # a single level needs no embedding to distinguish it
    converted["transformer.level_embed"] = queries.new_zeros(1, queries.shape[1])
    return converted


def config_options(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Turn a `config.json` of `DetrForObjectDetection` into model options.

    Raises:
        CheckpointError: we have no such model.
    """
    usual = {"dec_layers": 6, "num_queries": 100, "dim_feedforward": 2048}
    return {**usual, **common_options(config, source), **OPTIONS}


def from_hugging_face(
    state_dict: Mapping[str, Tensor], options: Mapping[str, Any], source: str
) -> dict[str, Tensor]:
    """Rename weights of `DetrForObjectDetection`.

    Raises:
        CheckpointError: a key belongs to no part of the model.
    """
    original = with_other_names(state_dict, _HUGGING_FACE, "DetrForObjectDetection", source)
    return complete_heads(from_detr(original, None, source), options)
