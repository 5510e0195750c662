"""Grounding DINO of Hugging Face transformers: what our detector takes of it, and what it does not.

Taken are the projections, the encoder with its enhancer, the decoder and the box heads. The image
backbone, a Swin that is normalised after every stage, and the text encoder are no parts of ours.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.weights.official import complete_heads
from models.weights.rename import renamer
from util.errors import CheckpointError

MODEL_TYPE = "grounding-dino"
TOKENS = "transformer.encoder.class_tokens.weight"  # a row for each class, or word of a prompt
_DEFAULTS = {  # of `GroundingDinoConfig`, as files may leave out what is usual
    "d_model": 256, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
    "num_queries": 900, "num_feature_levels": 4, "encoder_n_points": 4, "decoder_n_points": 4,
    "dropout": 0.1, "positional_embedding_temperature": 20, "decoder_bbox_embed_share": True,
    "two_stage_bbox_embed_share": False, "max_text_len": 256,
}  # fmt: skip
_OPTIONS = {
    "d_model": "hidden_dim",
    "encoder_layers": "enc_layers",
    "decoder_layers": "dec_layers",
    "encoder_ffn_dim": "dim_feedforward",
    "encoder_attention_heads": "nheads",
    "num_queries": "num_queries",
    "num_feature_levels": "num_feature_levels",
    "encoder_n_points": "enc_n_points",
    "decoder_n_points": "dec_n_points",
    "dropout": "dropout",
    "decoder_bbox_embed_share": "shared_heads",
}
_ALWAYS: Mapping[str, Any] = {
    "encoder_attn": "enhancer",
    "decoder_tokens": True,
    "with_box_refine": True,
    "two_stage": True,
    "mixed_query_selection": True,
    "class_proposals": True,
    "look_forward_twice": True,
    "query_position": "box",
    "decoder_norm": True,
    "position_offset": 0.0,
    "refine_eps": 1e-5,
}
_REQUIRED: Mapping[str, Any] = {
    "two_stage": True, "embedding_init_target": True, "activation_function": "relu",
    "position_embedding_type": "sine", "query_dim": 4, "layer_norm_eps": 1e-5,
}  # fmt: skip
# Swins of timm: of width, blocks and window.
_SWINS = {
    (96, (2, 2, 6, 2), 7): "timm/swin_tiny_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "timm/swin_base_patch4_window12_384",
}
_FEED_FORWARD = {"fc1": "linear1", "fc2": "linear2"}
_ENCODER = {
    **{f"deformable_layer.{theirs}": f"layers.#.{ours}" for theirs, ours in {
        "self_attn": "self_attn", "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2",
        **_FEED_FORWARD,
    }.items()},
    **{f"text_enhancer_layer.{theirs}": f"token_layers.#.{ours}" for theirs, ours in {
        "self_attn": "self_attn", "layer_norm_before": "norm1", "layer_norm_after": "norm2",
        **_FEED_FORWARD,
    }.items()},
    **{f"fusion_layer.{theirs}": f"fusions.#.{ours}" for theirs, ours in {
        "layer_norm_vision": "image_norm", "layer_norm_text": "token_norm",
        "attn.vision_proj": "image_key", "attn.text_proj": "token_key",
        "attn.values_vision_proj": "image_value", "attn.values_text_proj": "token_value",
        "attn.out_vision_proj": "image_out", "attn.out_text_proj": "token_out",
        "vision_param": "image_scale", "text_param": "token_scale",
    }.items()},
}  # fmt: skip
_DECODER = {
    "self_attn": "self_attn", "self_attn_layer_norm": "norm2", "encoder_attn_text": "token_attn",
    "encoder_attn_text_layer_norm": "token_norm", "encoder_attn": "cross_attn",
    "encoder_attn_layer_norm": "norm1", "final_layer_norm": "norm3", **_FEED_FORWARD,
}  # fmt: skip
# Theirs -> ours; # is one number.
_MODULES = {
    **{f"model.encoder.layers.#.{theirs}": f"transformer.encoder.{ours}"
       for theirs, ours in _ENCODER.items()},
    **{f"model.decoder.layers.#.{theirs}": f"transformer.decoder.layers.#.{ours}"
       for theirs, ours in _DECODER.items()},
    "model.decoder.layer_norm": "transformer.decoder.norm",
    "model.decoder.reference_points_head": "transformer.decoder.ref_point_head",
    "model.decoder.bbox_embed": "transformer.decoder.bbox_embed",
    **{f"model.{name}": f"transformer.{name}"
       for name in ("enc_output", "enc_output_norm", "level_embed")},
    "model.query_position_embeddings": "query_embed",
    "model.input_proj_vision": "input_proj",
    "model.encoder_output_bbox_embed": "encoder_box_head",
    "bbox_embed": "bbox_embed",
    "model.backbone.conv_encoder.model": "backbone.0.body",
    "model.text_backbone": "text_backbone",
    "model.text_projection": "text_projection",
}  # fmt: skip
_PROJECTIONS = ("query", "key", "value")
_QUERY = re.compile(r"transformer\..*\.query\.(weight|bias)")


def config_options(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Turn a `config.json` of `GroundingDinoForObjectDetection` into model options.

    `backbone` is the network of ours that is nearest to theirs.

    Raises:
        CheckpointError: we have no such model.
    """
    config = {**_DEFAULTS, **config}
    required = dict(_REQUIRED)
    for part in ("ffn_dim", "attention_heads"):
        required[f"decoder_{part}"] = config[f"encoder_{part}"]
    for name, wanted in required.items():
        if (found := config.get(name, wanted)) != wanted:
            raise CheckpointError(f"{source}: {name} is {found}; only {wanted} is supported.")
    options = {ours: config[theirs] for theirs, ours in _OPTIONS.items()}
    swin = config.get("backbone_config") or {}
    kind: Any = swin.get("embed_dim"), tuple(swin.get("depths") or ()), swin.get("window_size")
    return {
        **options,
        **_ALWAYS,
        "position_temperature": float(config["positional_embedding_temperature"]),
        "backbone": _SWINS.get(kind, "resnet50"),
    }


def max_tokens(config: Mapping[str, Any]) -> int:
    """Return how many words a prompt may have, those that separate phrases among them."""
    return int({**_DEFAULTS, **config}["max_text_len"])


def to_ours(
    state_dict: Mapping[str, Tensor], options: Mapping[str, Any], source: str
) -> dict[str, Tensor]:
    """Rename the weights of `GroundingDinoForObjectDetection`.

    Those of the backbone and of the text encoder are under names that no model of ours has.
    Class tokens and what scores are computed with are in no file.

    Raises:
        CheckpointError: a key belongs to no part of the model.
    """
    rename = renamer(_MODULES)
    found: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        try:
            found[rename(key)] = tensor
        except ValueError as error:
            raise CheckpointError(
                f"{source}: '{key}' is not a weight of GroundingDinoForObjectDetection. "
                "Save that model with save_pretrained()."
            ) from error
    for name in [name for name in found if _QUERY.match(name)]:
        parts = [found.pop(name.replace(".query.", f".{part}.")) for part in _PROJECTIONS]
        found[name.replace(".query.", ".in_proj_")] = torch.cat(parts)
    layers = int(options["dec_layers"])
    first = _taken(found, "bbox_embed.0.")
    encoder = _taken(found, "encoder_box_head.") or first  # one for both, which is stored once
    for index in range(layers):
        for name, tensor in first.items():  # shared, unless the layers have their own
            found.setdefault(f"bbox_embed.{index}.{name}", tensor)
    found |= {f"bbox_embed.{layers}.{key}": tensor for key, tensor in encoder.items()}
    return complete_heads(found, options)


def _taken(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove what begins with a prefix, and return it without."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}
