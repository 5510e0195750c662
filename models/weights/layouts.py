"""State dicts of other detectors of this family, under the official keys.

Each is recognised by its keys. What only helped training gets the keys of the recipe that does the
same; what shapes do not show is as in the published configurations. `tests/unit/models/weights/
published_keys.py` names the files that the layouts were read from.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.weights import detr
from models.weights.class_names import COCO_CATEGORIES, NUM_COCO_LOGITS, coco_logit_classes
from models.weights.detectron2 import with_torchvision_names
from models.weights.official import count_layers
from models.weights.rename import renamer
from util.classes import Classes
from util.console import log
from util.errors import CheckpointError

Weights = Mapping[str, Tensor]

_NUM_ONE_TO_ONE, _NUM_HYBRID = 300, 1800  # queries of H-DETR, and all of those it is trained with
# what DINO does in every implementation and shapes do not show
_DINO = {
    "look_forward_twice": True,
    "class_proposals": True,
    "refine_eps": 1e-3,
    "dropout": 0.0,
}
_DINO_SIGN = "transformer.decoder.ref_point_head.layers.0.weight"
_DINO_CONTENTS = "transformer.tgt_embed.weight"
_DINO_POSITIONS = {"position_temperature": 20.0, "position_offset": 0.0}
_COUNTERS = ("total_params", "total_ops")  # left by programs that count operations
_LABELS = "recipes.denoising.label_enc.weight"
# order of norms in a decoder layer: after attention among queries, to memory, feed-forward block
_DECODER_NORMS = {"norms.0": "norm2", "norms.1": "norm1", "norms.2": "norm3"}
_ENCODER_NORMS = {"norms.0": "norm1", "norms.1": "norm2"}
_DETREX_FEED_FORWARD = {"ffns.0.layers.0.0": "linear1", "ffns.0.layers.1": "linear2"}
_DETREX_ENCODER = {"attentions.0": "self_attn", **_ENCODER_NORMS, **_DETREX_FEED_FORWARD}
_MR = "recipes.mr"
_RELATIONS = ("transformer.decoder.position_relation_embedding.pos_proj.0.weight",)


@dataclass(frozen=True)
class Converted:
    """Weights under official keys, and what else the layout says.

    `options` are `ModelConfig` values; `classes` is None where the official rule holds.
    """

    weights: dict[str, Tensor]
    options: dict[str, Any]
    classes: Classes | None = None


@dataclass(frozen=True)
class Layout:
    """A program whose keys are not the official ones: some of them, and how they are converted.

    `convert` takes weights, what else the file holds, and its name for messages.
    """

    program: str
    expected: tuple[str, ...]
    convert: Callable[[Weights, Mapping[str, Any], str], Converted]


def from_official_keys(weights: Weights, args: Mapping[str, Any], source: str) -> Converted:
    """Return what has official keys, or nearly so: the official models, H-DETR and DINO.

    `args` is the command line that the file holds, empty if it has none.

    Raises:
        CheckpointError: it is a DINO of a kind that we lack.
    """
    kept = {key: tensor for key, tensor in weights.items() if not key.endswith(_COUNTERS)}
    if _DINO_SIGN in kept:
        return _from_dino(kept, args, source)
    options: dict[str, Any] = {}
    if args.get("look_forward_twice"):
        options["look_forward_twice"] = True
    queries = kept.get("query_embed.weight")
    count = args.get("num_queries_one2one")
    if count is None and queries is not None and len(queries) == _NUM_HYBRID:
        count = _NUM_ONE_TO_ONE
        log.info(
            f"{source}: {_NUM_HYBRID} queries, of which H-DETR detects with the first {count}; the "
            "others only train"
        )
    if count is not None and queries is None:
        options["num_queries"] = count
    if count is not None and queries is not None and len(queries) > count:
        kept["query_embed.weight"] = queries[:count]
        kept["recipes.hybrid.query_embed.weight"] = queries[count:]
    return Converted(kept, options)


def _from_dino(weights: Weights, args: Mapping[str, Any], source: str) -> Converted:
    """Convert the original DINO, which differs from the official model around its heads."""
    if _DINO_CONTENTS not in weights or "transformer.enc_output.weight" not in weights:
        raise CheckpointError(
            f"{source}: a DINO without proposals or without learned contents; only its published "
            "form is supported, `two_stage_type standard` with `embed_init_tgt`."
        )
    encoder = count_layers(weights, "transformer.decoder.layers")
    rename = renamer(
        {
            "transformer.enc_out_class_embed": f"class_embed.{encoder}",
            "transformer.enc_out_bbox_embed": f"bbox_embed.{encoder}",
            "transformer.tgt_embed": "query_embed",
            "label_enc": _LABELS.removesuffix(".weight"),
            **{part: part for part in ("backbone", "input_proj", "class_embed", "bbox_embed")},
            "transformer": "transformer",
        }
    )
    converted = _renamed(weights, rename, "DINO", source)
    options: dict[str, Any] = {**_DINO, **_DINO_POSITIONS}
    if temperature := args.get("pe_temperatureH"):
        if temperature != args.get("pe_temperatureW", temperature):
            raise CheckpointError(
                f"{source}: pe_temperatureH and pe_temperatureW differ; only "
                "equal ones are supported."
            )
        options["position_temperature"] = float(temperature)
    first, second = (converted.get(f"bbox_embed.{layer}.layers.2.weight") for layer in (0, 1))
    shared = first is not None and second is not None and first.equal(second)
    return Converted(_with_labels(converted), {**options, "shared_heads": shared})


def _from_detrex(weights: Weights, content: Mapping[str, Any], source: str) -> Converted:
    """Convert a DINO of detrex, or what keeps its model: Align-DETR, and Stable-DINO."""
    decoder = {
        "attentions.0.attn": "self_attn", "attentions.1": "cross_attn", **_DECODER_NORMS,
        **_DETREX_FEED_FORWARD,
    }  # fmt: skip
    modules = _in_layers("encoder", _DETREX_ENCODER) | _in_layers("decoder", decoder) | {
        "neck.convs.#.conv": "input_proj.#.0",
        "neck.convs.#.norm": "input_proj.#.1",
        "transformer.level_embeds": "transformer.level_embed",
        "transformer.tgt_embed": "query_embed",
        "label_enc": _LABELS.removesuffix(".weight"),
        "backbone": "backbone.0.body",
        **{part: part for part in (
            "transformer.encoder.fusion_layer",  # of Stable-DINO
            "transformer.decoder.ref_point_head", "transformer.decoder.norm",
            "transformer.decoder.class_embed", "transformer.decoder.bbox_embed",
            "transformer.enc_output", "transformer.enc_output_norm", "class_embed", "bbox_embed",
        )},
    }  # fmt: skip
    weights = _one_neck(_with_torchvision_body(weights, source))
    converted = _renamed(weights, renamer(modules), "detrex's DINO", source)
    return Converted(_with_labels(converted), dict(_DINO), _coco_classes(converted))


def _from_mr_detr(weights: Weights, content: Mapping[str, Any], source: str) -> Converted:
    """Convert Mr. DETR on Deformable DETR, which is built on detrex."""
    block, own = "ffns.0.layers", f"{_MR}.layers.#.feed_forward"
    decoder = {
        "attentions.0.attn": "self_attn", "attentions.0.norm_o2o": "norm2",
        "attentions.1": "cross_attn", "norms.0": "norm1", "norms.1": "norm3",
        f"{block}.0.linear.linear": "linear1", f"{block}.1.linear": "linear2",
    }  # fmt: skip
    layer = "transformer.decoder.layers.#"
    modules = _in_layers("encoder", _DETREX_ENCODER) | _in_layers("decoder", decoder) | {
        f"{layer}.{block}.0.linear.linear_sep": f"{own}.linear1",
        f"{layer}.{block}.1.linear_sep": f"{own}.linear2",
        f"{layer}.attentions.0.norm_o2m": f"{_MR}.layers.#.norm",
        f"{layer}.attentions.0.instruction_o2m": f"{_MR}.layers.#.contents",
        f"{layer}.attentions.0.instruction_o2m_pos": f"{_MR}.layers.#.positions",
        "transformer.decoder.class_embed_o2m_encoder": f"{_MR}.encoder_heads.score",
        "transformer.decoder.bbox_embed_enc_o2m": f"{_MR}.encoder_heads.box",
        "neck.convs.#.conv": "input_proj.#.0",
        "neck.convs.#.norm": "input_proj.#.1",
        "transformer.level_embeds": "transformer.level_embed",
        "query_embedding": "query_embed",
        "backbone": "backbone.0.body",
        **{part: part for part in (
            "transformer.decoder.class_embed", "transformer.decoder.bbox_embed",
            "transformer.enc_output", "transformer.enc_output_norm", "transformer.pos_trans",
            "transformer.pos_trans_norm", "class_embed", "bbox_embed",
        )},
    }  # fmt: skip
    weights = _one_neck(_with_torchvision_body(weights, source))
    converted = _renamed(weights, renamer(modules), "Mr. DETR", source)
    for index in range(count_layers(converted, f"{_MR}.layers")):
        name = f"{_MR}.layers.{index}"
        pair = [converted.pop(f"{name}.{part}.weight") for part in ("contents", "positions")]
        converted[f"{name}.tokens"] = torch.stack(pair)
    for part in ("weight", "bias"):  # of all of its scores, the first stands for any object
        name = f"{_MR}.encoder_heads.score.{part}"
        converted[name] = converted[name][:1]
    options = {"with_box_refine": True, "look_forward_twice": True, "dropout": 0.0}
    return Converted(converted, options, _coco_classes(converted))


def _from_relation_detr(weights: Weights, content: Mapping[str, Any], source: str) -> Converted:
    """Convert Relation-DETR; what its hybrid branch has for itself goes to the recipe `hybrid`."""
    encoder = count_layers(weights, "transformer.decoder.class_head")
    modules = {
        "transformer.decoder.class_head": "class_embed",
        "transformer.decoder.bbox_head": "bbox_embed",
        "transformer.encoder_class_head": f"class_embed.{encoder}",
        "transformer.encoder_bbox_head": f"bbox_embed.{encoder}",
        "transformer.tgt_embed": "query_embed",
        "transformer.hybrid_tgt_embed": "recipes.hybrid.query_embed",
        "transformer.hybrid_class_head": "recipes.hybrid.encoder_heads.score",
        "transformer.hybrid_bbox_head": "recipes.hybrid.encoder_heads.box",
        "transformer.level_embeds": "transformer.level_embed",
        "denoising_generator.label_encoder": _LABELS.removesuffix(".weight"),
        "neck.convs.#": "input_proj.#",
        "backbone": "backbone.0.body",
        "transformer": "transformer",
    }
    converted = _with_biases(_renamed(weights, renamer(modules), "Relation-DETR", source))
    for key in _RELATIONS:  # there, a convolution of one pixel
        converted[key] = converted[key].flatten(1)
    return Converted(_with_labels(converted), dict(_DINO), _coco_classes(converted))


def _from_mmdetection(weights: Weights, content: Mapping[str, Any], source: str) -> Converted:
    """Convert Deformable DETR and DINO of mmdetection 3."""
    feed_forward = {"ffn.layers.0.0": "linear1", "ffn.layers.1": "linear2"}
    encoder = {"self_attn": "self_attn", **_ENCODER_NORMS, **feed_forward}
    decoder = {
        "self_attn.attn": "self_attn", "cross_attn": "cross_attn", **_DECODER_NORMS, **feed_forward
    }  # fmt: skip
    modules = {
        **{f"encoder.layers.#.{theirs}": f"transformer.encoder.layers.#.{ours}"
           for theirs, ours in encoder.items()},
        **{f"decoder.layers.#.{theirs}": f"transformer.decoder.layers.#.{ours}"
           for theirs, ours in decoder.items()},
        "decoder.ref_point_head": "transformer.decoder.ref_point_head",
        "decoder.norm": "transformer.decoder.norm",
        "backbone": "backbone.0.body",
        "neck.convs.#.conv": "input_proj.#.0",
        "neck.convs.#.gn": "input_proj.#.1",
        "level_embed": "transformer.level_embed",
        "query_embedding": "query_embed",
        "reference_points_fc": "transformer.reference_points",
        "memory_trans_fc": "transformer.enc_output",
        "memory_trans_norm": "transformer.enc_output_norm",
        "pos_trans_fc": "transformer.pos_trans",
        "pos_trans_norm": "transformer.pos_trans_norm",
        "bbox_head.cls_branches.#": "class_embed.#",
        **{f"bbox_head.reg_branches.#.{2 * i}": f"bbox_embed.#.layers.{i}" for i in range(3)},
        "dn_query_generator.label_embedding": _LABELS.removesuffix(".weight"),
    }  # fmt: skip
    converted = _renamed(_one_neck(weights), renamer(modules), "mmdetection's models", source)
    converted = _with_biases(converted)
    options: dict[str, Any] = {}
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    if _DINO_SIGN in converted:
        options = {**_DINO, **_DINO_POSITIONS, **_positions_in(meta)}
    if "transformer.enc_output.weight" in converted:
        options["with_box_refine"] = True  # which equal heads of a fresh model do not show
    classes = _coco_classes(converted)
    names = meta.get("dataset_meta")
    names = names.get("classes", names.get("CLASSES")) if isinstance(names, Mapping) else None
    count = _num_classes(converted)
    if isinstance(names, (list, tuple)) and len(names) == count:
        coco = tuple(COCO_CATEGORIES.values())
        texts = tuple(map(str, names))
        ids = tuple(COCO_CATEGORIES) if texts == coco else tuple(range(count))
        classes = Classes(ids, texts)
    return Converted(_with_labels(converted), options, classes)


def _positions_in(meta: Mapping[str, Any]) -> dict[str, float]:
    """Return what the configuration that mmdetection saves as text says of positions."""
    given = re.search(r"positional_encoding=dict\(([^()]*)\)", str(meta.get("cfg", "")))
    if given is None:
        return {}
    number = r"=\s*(-?\d+(?:\.\d*)?)"
    found = {name: re.search(rf"\b{name}{number}", given[1]) for name in ("temperature", "offset")}
    usual = {"temperature": 10000.0, "offset": 0.0}  # of its positional encoding
    return {
        f"position_{name}": float(match[1]) if match else usual[name]
        for name, match in found.items()
    }


def _from_detr(weights: Weights, content: Mapping[str, Any], source: str) -> Converted:
    """Convert the original DETR."""
    args = content.get("args")
    args = args if isinstance(args, argparse.Namespace) else None
    converted = detr.from_detr(weights, args, source)
    count = len(converted["class_embed.0.bias"])
    classes = Classes(tuple(range(count)), ("",) * count)
    return Converted(
        converted, dict(detr.OPTIONS), coco_logit_classes() if count == NUM_COCO_LOGITS else classes
    )


LAYOUTS = (
    Layout("DETR", detr.SIGNS, _from_detr),
    Layout(
        "Mr. DETR",
        (
            "transformer.decoder.layers.0.attentions.0.instruction_o2m.weight",
            "transformer.decoder.layers.0.ffns.0.layers.0.linear.linear_sep.weight",
            "transformer.decoder.class_embed_o2m_encoder.weight",
            "transformer.pos_trans.weight",
        ),
        _from_mr_detr,
    ),
    Layout(
        "Relation-DETR",
        (
            *_RELATIONS,
            "transformer.encoder_class_head.weight",
            "transformer.tgt_embed.weight",
            "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
            "neck.convs.0.0.weight",
        ),
        _from_relation_detr,
    ),
    Layout(
        "detrex",
        (
            "transformer.level_embeds",
            "transformer.tgt_embed.weight",
            _DINO_SIGN,
            "transformer.encoder.layers.0.attentions.0.sampling_offsets.weight",
            "neck.convs.0.conv.weight",
        ),
        _from_detrex,
    ),
    Layout(
        "mmdetection",
        (
            "level_embed",
            "encoder.layers.0.self_attn.sampling_offsets.weight",
            "decoder.layers.0.self_attn.attn.in_proj_weight",
            "neck.convs.0.conv.weight",
            "bbox_head.cls_branches.0.bias",
        ),
        _from_mmdetection,
    ),
)


def _renamed(
    weights: Weights, rename: Callable[[str], str], model: str, source: str
) -> dict[str, Tensor]:
    converted, strange = {}, []
    for key, tensor in weights.items():
        try:
            converted[rename(key)] = tensor
        except ValueError:
            strange.append(key)
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise CheckpointError(
            f"{source}: looks like {model}, with parts that are not supported: "
            f"{', '.join(strange[:3])}{more}. Use a checkpoint of its published form."
        )
    return converted


def _in_layers(side: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Return the modules of every layer of a side of the transformer, by their names there."""
    layer = f"transformer.{side}.layers.#"
    return {f"{layer}.{theirs}": f"{layer}.{ours}" for theirs, ours in parts.items()}


def _with_torchvision_body(weights: Weights, source: str) -> dict[str, Tensor]:
    """Give a ResNet of detectron2 the names that torchvision has for its parts."""
    body = {k.removeprefix("backbone."): t for k, t in weights.items() if k.startswith("backbone.")}
    rest = {key: tensor for key, tensor in weights.items() if not key.startswith("backbone.")}
    body = with_torchvision_names(body, source)
    return {**{f"backbone.{key}": tensor for key, tensor in body.items()}, **rest}


def _with_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give projections a bias of zeros, where convolutions with a norm after them have none."""
    for key in [key for key in weights if re.fullmatch(r"input_proj\.\d+\.0\.weight", key)]:
        bias = key.replace("weight", "bias")
        weights.setdefault(bias, weights[key].new_zeros(len(weights[key])))
    return weights


def _one_neck(weights: Weights) -> dict[str, Tensor]:
    """Number the convolutions of further levels after those of the backbone's maps."""
    count = count_layers(weights, "neck.convs")
    return {
        re.sub(
            r"^neck\.extra_convs\.(\d+)", lambda m: f"neck.convs.{count + int(m[1])}", key
        ): tensor
        for key, tensor in weights.items()
    }


def _with_labels(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give denoising's embedding a row for each class, and one of zeros for an empty slot."""
    if _LABELS in weights:
        labels = weights[_LABELS][: _num_classes(weights)]
        weights[_LABELS] = torch.cat([labels, torch.zeros_like(labels[:1])])
    return weights


def _coco_classes(weights: Weights) -> Classes | None:
    """Return COCO's 80 categories where there are as many logits, as these programs order them."""
    if _num_classes(weights) != len(COCO_CATEGORIES):
        return None
    return Classes(tuple(COCO_CATEGORIES), tuple(COCO_CATEGORIES.values()))


def _num_classes(weights: Weights) -> int:
    """Return the number of logits; a tensor with two keys may be stored under either."""
    places = ("class_embed.0.bias", "transformer.decoder.class_embed.0.bias")
    return len(next(weights[place] for place in places if place in weights))
