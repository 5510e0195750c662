"""Deformable DETR of Hugging Face transformers (4.x and 5.x): its config and its key names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.weights.class_names import NUM_COCO_LOGITS, coco_logit_classes
from models.weights.folder import write_folder
from models.weights.official import RESNETS, complete_heads, published_weights
from models.weights.rename import renamer
from util.classes import Classes
from util.errors import CheckpointError

_ENCODER = {"self_attn": "self_attn", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_DECODER = {
    "cross_attn": "encoder_attn",
    **{f"self_attn.{part}_proj": f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
    "norm1": "encoder_attn_layer_norm",
    "norm2": "self_attn_layer_norm",
    "norm3": "final_layer_norm",
}
_FEED_FORWARD = {"linear1": "fc1", "linear2": "fc2"}
_BODY, _HF_BODY = "backbone.0.body", "model.backbone.conv_encoder.model"
# Official module -> theirs, as 4.x names it and every version reads it; # is one number.
_MODULES = {
    **{f"transformer.encoder.layers.#.{ours}": f"model.encoder.layers.#.{theirs}"
       for ours, theirs in (_ENCODER | _FEED_FORWARD).items()},
    **{f"transformer.decoder.layers.#.{ours}": f"model.decoder.layers.#.{theirs}"
       for ours, theirs in (_DECODER | _FEED_FORWARD).items()},
    **{f"transformer.{name}": f"model.{name}" for name in (
        "level_embed", "reference_points", "enc_output", "enc_output_norm", "pos_trans",
        "pos_trans_norm", "decoder.bbox_embed", "decoder.class_embed")},
    "class_embed": "class_embed",
    "bbox_embed": "bbox_embed",
    "query_embed": "model.query_position_embeddings",
    "input_proj": "model.input_proj",
    "backbone.1.row_embed": "model.backbone.position_embedding.row_embeddings",
    "backbone.1.col_embed": "model.backbone.position_embedding.column_embeddings",
}  # fmt: skip
_TIMM_BODY = {_BODY: _HF_BODY}
_OWN_BODY = {  # transformers' own ResNet
    f"{_BODY}.conv1": f"{_HF_BODY}.embedder.embedder.convolution",
    f"{_BODY}.bn1": f"{_HF_BODY}.embedder.embedder.normalization",
    **{
        f"{_BODY}.layer{stage + 1}.#.{ours}": f"{_HF_BODY}.encoder.stages.{stage}.layers.#.{theirs}"
        for stage in range(4)
        for ours, theirs in {
            **{f"conv{i + 1}": f"layer.{i}.convolution" for i in range(3)},
            **{f"bn{i + 1}": f"layer.{i}.normalization" for i in range(3)},
            "downsample.0": "shortcut.convolution",
            "downsample.1": "shortcut.normalization",
        }.items()
    },
}
# What 5.x calls modules inside, and in files saved with its own names.
_NAMES_OF_5 = (
    (r"^model\.backbone\.model\.", f"{_HF_BODY}."),
    (r"^model\.position_embedding\.", "model.backbone.position_embedding."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"(\.layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
)
_PROJECTION = re.compile(r"(?<=_attn\.)[qkv]_proj\.")  # ours are one, in_proj
_HIDDEN_SIZES = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
_OPTIONS = {
    "position_embedding_type": "position_embedding",
    "num_feature_levels": "num_feature_levels",
    "encoder_layers": "enc_layers",
    "decoder_layers": "dec_layers",
    "encoder_ffn_dim": "dim_feedforward",
    "d_model": "hidden_dim",
    "dropout": "dropout",
    "encoder_attention_heads": "nheads",
    "num_queries": "num_queries",
    "encoder_n_points": "enc_n_points",
    "decoder_n_points": "dec_n_points",
    "with_box_refine": "with_box_refine",
    "two_stage": "two_stage",
    "dilation": "dilation",
}
_ALIKE = {  # theirs for the decoder -> theirs for the encoder; ours is one option for both
    "decoder_ffn_dim": "encoder_ffn_dim",
    "decoder_attention_heads": "encoder_attention_heads",
}


def to_official(
    state_dict: Mapping[str, Tensor], options: Mapping[str, Any], source: str
) -> dict[str, Tensor]:
    """Rename the weights of `DeformableDetrForObjectDetection` to the official keys.

    Raises:
        CheckpointError: a key belongs to no part of the model.
    """
    renamed = with_other_names(state_dict, _MODULES, "DeformableDetrForObjectDetection", source)
    return complete_heads(renamed, options)


def with_other_names(
    state_dict: Mapping[str, Tensor], modules: Mapping[str, str], model: str, source: str
) -> dict[str, Tensor]:
    """Rename the weights of a `model` of transformers; projections of attention become one.

    `modules`: the names wanted -> theirs of version 4, but for the backbone's body.

    Raises:
        CheckpointError: a key belongs to no part of the model.
    """
    names = {key: key for key in state_dict}
    for pattern, name_of_4 in _NAMES_OF_5:
        names = {key: re.sub(pattern, name_of_4, name) for key, name in names.items()}
    own = any(name.startswith(f"{_HF_BODY}.embedder.") for name in names.values())
    body = _OWN_BODY if own else _TIMM_BODY
    rename = renamer({theirs: ours for ours, theirs in (dict(modules) | body).items()})
    converted: dict[str, Tensor] = {}
    for key, name in names.items():
        try:
            converted[rename(name)] = state_dict[key]
        except ValueError as error:
            raise CheckpointError(
                f"{source}: '{key}' is not a weight of {model}. "
                "Save that model with save_pretrained()."
            ) from error
    split = [name for name in converted if _PROJECTION.search(name)]
    for fused in dict.fromkeys(_PROJECTION.sub("in_proj_", name) for name in split):
        try:
            parts = [converted.pop(fused.replace("in_proj_", f"{part}_proj.")) for part in "qkv"]
        except KeyError as error:
            raise CheckpointError(
                f"{source}: '{fused}' lacks a projection. Download it again."
            ) from error
        converted[fused] = torch.cat(parts)
    return converted


def to_hugging_face(state_dict: Mapping[str, Tensor], *, timm_backbone: bool) -> dict[str, Tensor]:
    """Rename official weights to the keys `from_pretrained` reads, 4.x and 5.x alike.

    `timm_backbone`: the config says `use_timm_backbone`; else transformers' own ResNet.
    """
    rename = renamer(_MODULES | (_TIMM_BODY if timm_backbone else _OWN_BODY))
    converted: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        parts = {key: tensor}
        if ".in_proj_" in key:
            parts = {
                key.replace("in_proj_", f"{part}_proj."): piece.clone()
                for part, piece in zip("qkv", tensor.chunk(3), strict=True)
            }
        converted |= {rename(name): part for name, part in parts.items()}
    return converted


def save_hugging_face(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    *,
    options: Mapping[str, Any],
    classes: Classes,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    image_size: tuple[int, int],
) -> list[str]:
    """Write a folder that `DeformableDetrForObjectDetection.from_pretrained` loads.

    It holds `config.json`, `model.safetensors` and `preprocessor_config.json`. `options` are
    `ModelConfig` values; `image_size` is (short side, maximum long side) in pixels.

    Returns:
        The names of tensors that were left out: those of recipes, which only train a model.

    Raises:
        CheckpointError: transformers has no such model, or the folder cannot be written.
    """
    weights, left_out = published_weights(state_dict, options, folder)
    timm_backbone = bool(options.get("dilation"))  # transformers' own ResNet cannot dilate
    tensors = to_hugging_face(weights, timm_backbone=timm_backbone)
    # 5.x reads learned positions under its own name alone, and 4.x under the other
    tensors |= {
        key.replace("model.backbone.position_", "model.position_"): tensor
        for key, tensor in tensors.items()
        if key.startswith("model.backbone.position_")
    }
    config = _config(options, classes, timm_backbone=timm_backbone)
    config["dtype"] = str(weights["transformer.level_embed"].dtype).removeprefix("torch.")
    processor = {
        "image_processor_type": "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": dict(zip(("shortest_edge", "longest_edge"), image_size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image_mean),
        "image_std": list(image_std),
        "do_pad": True,
    }
    write_folder(folder, tensors, {"config.json": config, "preprocessor_config.json": processor})
    return left_out


def _config(options: Mapping[str, Any], classes: Classes, *, timm_backbone: bool) -> dict[str, Any]:
    """Return what `config_options` and `config_classes` read, as transformers writes it."""
    config = {theirs: options[ours] for theirs, ours in _OPTIONS.items() if ours in options}
    config |= {ours: config[theirs] for ours, theirs in _ALIKE.items() if theirs in config}
    names = [name or "N/A" for name in classes.names]
    if not any(classes.names):
        names = [str(category) for category in classes.ids]
    config |= {
        "model_type": "deformable_detr",
        "architectures": ["DeformableDetrForObjectDetection"],
        "activation_function": "relu",
        "two_stage_num_proposals": options.get("num_queries", 300),
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "use_timm_backbone": timm_backbone,
        "use_pretrained_backbone": False,
    }
    backbone = str(options["backbone"])
    if timm_backbone:
        return config | {"backbone": backbone, "backbone_config": None}
    kind, depths = next(layout for layout, name in RESNETS.items() if name == backbone)
    last_stage_alone = options.get("num_feature_levels") == 1
    return config | {
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 64,
            "hidden_sizes": _HIDDEN_SIZES[kind],
            "depths": list(depths),
            "layer_type": kind,
            "out_features": ["stage4"] if last_stage_alone else ["stage2", "stage3", "stage4"],
        },
    }


def config_options(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Turn a `config.json` into model options, by `ModelConfig` name.

    Raises:
        CheckpointError: the config describes another model, or one we cannot build.
    """
    _require(config, "model_type", "deformable_detr", source)
    options: dict[str, Any] = {"dec_layers": 6, "with_box_refine": False, "two_stage": False}
    options |= common_options(config, source)
    if options["two_stage"]:
        options["num_queries"] = config.get("two_stage_num_proposals", 300)
    return options


def common_options(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the model options that DETR's config shares with Deformable DETR's.

    Raises:
        CheckpointError: we have no such model.
    """
    _require(config, "activation_function", "relu", source)
    for decoder, encoder in _ALIKE.items():
        if encoder in config:
            _require(config, decoder, config[encoder], source)
    options = {ours: config[theirs] for theirs, ours in _OPTIONS.items() if theirs in config}
    return options | {"backbone": _backbone(config, source)}


def _require(config: Mapping[str, Any], key: str, wanted: Any, source: str) -> None:
    if config.get(key, wanted) != wanted:
        raise CheckpointError(f"{source}: {key} is {config[key]}; only {wanted} is supported.")


def _backbone(config: Mapping[str, Any], source: str) -> str:
    own = config.get("backbone_config")
    if not own or own.get("model_type") == "timm_backbone":
        name = str((own or config).get("backbone") or "resnet50")
        resnet = re.fullmatch(r"(?:microsoft/)?resnet-?(18|34|50|101)(?:\..*)?", name)
        return f"resnet{resnet[1]}" if resnet else f"timm/{name.removeprefix('timm/')}"
    kind = own.get("layer_type", "bottleneck")
    depths = tuple(own.get("depths", (3, 4, 6, 3)))
    regular = (
        own.get("model_type") == "resnet"
        and own.get("embedding_size", 64) == 64
        and own.get("hidden_sizes", _HIDDEN_SIZES["bottleneck"]) == _HIDDEN_SIZES.get(kind)
        and not own.get("downsample_in_bottleneck")
        and not own.get("downsample_in_first_stage")
    )
    if not regular or (kind, depths) not in RESNETS:
        raise CheckpointError(
            f"{source}: the backbone {own.get('model_type')} with depths {list(depths)} is not "
            "supported, only a ResNet 18, 34, 50 or 101, or one from timm."
        )
    return RESNETS[kind, depths]


def config_classes(config: Mapping[str, Any], num_logits: int) -> Classes:
    """Return the label space; the published 91-label COCO models use category ids."""
    stated = (config.get("id2label") or {}).items()
    names = {int(label): "" if name == "N/A" else str(name) for label, name in stated}
    coco = coco_logit_classes()
    if num_logits == NUM_COCO_LOGITS and all(
        names.get(i, name) == name for i, name in zip(coco.ids, coco.names, strict=True) if name
    ):
        return coco
    ids = tuple(range(num_logits))
    return Classes(ids, tuple(names.get(i, "") for i in ids))
