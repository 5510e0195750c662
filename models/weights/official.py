"""Checkpoints of the official implementation: which model they hold, and writing them.

Our state-dict keys are the official ones, so weights need no conversion; what the file does not
say about the model is read off the shapes of its tensors.
"""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.recipes import RECIPES
from models.weights.class_names import NUM_COCO_LOGITS, coco_logit_classes
from util.classes import Classes
from util.errors import CheckpointError, brief
from util.tensor_files import save_whole

# (kind of block, blocks per stage) -> torchvision's name
RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
}
_SIZES = (
    "hidden_dim", "num_feature_levels", "enc_layers", "dec_layers", "dim_feedforward",
    "enc_n_points", "dec_n_points", "num_queries",
)  # fmt: skip
# Options that shapes do not show; the names are the official ones.
_ONLY_IN_ARGS = ("backbone", "dilation", "dropout", "nheads", "num_queries", "aux_loss")
# Options that change what is detected and that the official code lacks, with what it does.
_ONLY_OURS = {
    "mixed_query_selection": False,
    "query_position": "fixed",
    "decoder_norm": False,
    "class_proposals": False,
    "position_temperature": 10000.0,
    "position_offset": -0.5,
    "refine_eps": 1e-5,
}
_SHOWN_BY = (  # keys that only models with an option have
    ("decoder.norm.weight", "decoder_norm", True),
    ("decoder.position_relation_embedding.pos_proj.0.weight", "relation", "previous"),
    ("encoder.fusion_layer.0.weight", "enc_fusion", "dense"),
    ("encoder.memory_fusion.0.weight", "enc_fusion", "mlp"),
)
_POSITION_EMBEDDINGS = {"sine": "sine", "v2": "sine", "learned": "learned", "v3": "learned"}
_DEFAULT_HEADS = 8
_OF_RECIPES = "recipes."


def is_deformable_detr(state_dict: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of a Deformable DETR in official naming."""
    return "transformer.level_embed" in state_dict and not state_dict.keys().isdisjoint(
        {"class_embed.0.bias", "transformer.decoder.class_embed.0.bias"}
    )


def official_options(
    state_dict: Mapping[str, Tensor], args: argparse.Namespace | None, source: str
) -> dict[str, Any]:
    """Return the model options (by `ModelConfig` name) that these weights need.

    Shapes decide wherever they show an option; `args`, the command line stored in the file,
    gives the others. What neither says (dilation without `args`, for one) is left out.

    Raises:
        CheckpointError: the weights need something this model does not have.
    """
    stored = vars(args) if args is not None else {}
    scale = stored.get("position_embedding_scale", 2 * math.pi)
    if not math.isclose(scale, 2 * math.pi, rel_tol=1e-6):
        raise CheckpointError(
            f"{source}: position_embedding_scale is {scale}; only 2 pi is supported."
        )
    options = {name: stored[name] for name in _ONLY_IN_ARGS if name in stored}
    embedding = stored.get("position_embedding", "sine")
    if embedding not in _POSITION_EMBEDDINGS:
        raise CheckpointError(
            f"{source}: position_embedding is '{embedding}'; only sine and learned are supported."
        )
    options["position_embedding"] = _POSITION_EMBEDDINGS[embedding]
    return options | _options_from_shapes(state_dict, int(options.get("nheads", _DEFAULT_HEADS)))


def count_layers(state_dict: Mapping[str, Any], prefix: str) -> int:
    """Return how many numbered modules lie under `prefix`, never more than there are names."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({m[1] for m in map(pattern.match, state_dict) if m})


def _options_from_shapes(state_dict: Mapping[str, Tensor], nheads: int) -> dict[str, Any]:
    levels, width = state_dict["transformer.level_embed"].shape
    options: dict[str, Any] = {
        "num_feature_levels": levels,
        "hidden_dim": width,
        "two_stage": "transformer.enc_output.weight" in state_dict,
        "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state_dict,
    }
    if options["two_stage"] and "query_embed.weight" in state_dict:
        options["mixed_query_selection"] = True
    if "transformer.decoder.ref_point_head.layers.0.weight" in state_dict:
        scaled = "transformer.decoder.query_scale.layers.0.weight" in state_dict
        options["query_position"] = "scaled_box" if scaled else "box"
    for key, name, value in _SHOWN_BY:
        if f"transformer.{key}" in state_dict:
            options[name] = value
    # The decoder's copy may have been stripped: refining heads are distinct all the same.
    first, second = (state_dict.get(f"bbox_embed.{i}.layers.2.bias") for i in (0, 1))
    if first is not None and second is not None:
        options["with_box_refine"] |= not first.equal(second)
    for name, side, attention in (
        ("enc", "encoder", "self_attn"),
        ("dec", "decoder", "cross_attn"),
    ):
        options[f"{name}_layers"] = count_layers(state_dict, f"transformer.{side}.layers")
        weights = state_dict.get(f"transformer.{side}.layers.0.{attention}.attention_weights.bias")
        if weights is not None:
            options[f"{name}_n_points"] = len(weights) // (nheads * levels)
    lengths = {
        "dim_feedforward": "transformer.encoder.layers.0.linear1.bias",
        "num_queries": "query_embed.weight",
    }
    options |= {name: len(state_dict[key]) for name, key in lengths.items() if key in state_dict}
    if "backbone.1.row_embed.weight" in state_dict:
        options["position_embedding"] = "learned"
    body = "backbone.0.body.layer"
    kind = "bottleneck" if f"{body}1.0.conv3.weight" in state_dict else "basic"
    blocks = tuple(count_layers(state_dict, f"{body}{stage}") for stage in range(1, 5))
    resnet = RESNETS.get((kind, blocks))
    return options | ({"backbone": resnet} if resnet else {})


def check_sizes(state_dict: Mapping[str, Tensor], options: Mapping[str, Any], source: str) -> None:
    """Compare the sizes that a checkpoint states with those of its weights.

    A model is built before weights are put in it: without this, a small file could claim one that
    takes all memory.

    Raises:
        CheckpointError: they differ.
    """
    nheads = options.get("nheads", _DEFAULT_HEADS)
    if type(nheads) is not int or nheads < 1:
        return  # no option can be so, which is said of it
    try:
        found = _options_from_shapes(state_dict, nheads)
    except (AttributeError, LookupError, TypeError, ValueError):
        return  # no such weights: they will not fit the model, whose size `check_claims` bounds
    for name in _SIZES:
        stated, real = options.get(name), found.get(name)
        if stated is not None and real and stated != real:
            raise CheckpointError(
                f"{source}: states `{name} {brief(stated)}`, but its weights are of {real}. "
                "Use another checkpoint, or the weights alone."
            )


def complete_heads(
    state_dict: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the weights with prediction heads under every name the official model gives them.

    Without refinement all layers share one head, with it the decoder holds the box heads (and
    in two-stage the class heads) too; files that store shared tensors once lack the other names.
    """
    complete, prefix = dict(state_dict), "transformer.decoder."
    count = options["dec_layers"] + int(options["two_stage"])
    for head, repeated in (
        ("bbox_embed", options["with_box_refine"]),
        ("class_embed", options["two_stage"]),
    ):
        heads: dict[str, Tensor] = {}
        for place in (prefix, ""):
            found = (key for key in state_dict if key.startswith(f"{place}{head}."))
            heads |= {key.removeprefix(place): state_dict[key] for key in found}
        if all(key.startswith(f"{head}.0.") for key in heads):  # shared, and stored once
            tails = {key.removeprefix(f"{head}.0."): tensor for key, tensor in heads.items()}
            heads = {f"{head}.{i}.{tail}": t for i in range(count) for tail, t in tails.items()}
        if repeated:
            heads |= {f"{prefix}{key}": tensor for key, tensor in heads.items()}
        complete = heads | complete
    return complete


def official_classes(state_dict: Mapping[str, Tensor]) -> Classes:
    """Return the label space of a file that names no classes, from the size of its head.

    91 logits are COCO's category ids; of any other number each goes by its index,
    which stands for that category id.
    """
    count = len(state_dict["class_embed.0.bias"])
    if count == NUM_COCO_LOGITS:
        return coco_logit_classes()
    return Classes(tuple(range(count)), ("",) * count)


def save_official(
    path: Path, state_dict: Mapping[str, Tensor], *, options: Mapping[str, Any], epoch: int
) -> list[str]:
    """Write weights as the official code loads them: `model`, `args` and `epoch`.

    Returns:
        The names of tensors that were left out: those of recipes, which only train a model.

    Raises:
        CheckpointError: the official code has no such model, or the file cannot be written.
    """
    weights, left_out = published_weights(state_dict, options, path)
    save_whole(path, {"model": weights, "args": argparse.Namespace(**options), "epoch": epoch})
    return left_out


def lacking_elsewhere(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> str:
    """Return what a model has that other implementations lack, after "no"; "" if there is nothing.

    Weights of recipes that only train a model do not count.
    """
    for name, usual in (
        ("backbone", r"resnet\d+"),
        ("dcn", "none"),
        ("encoder", "deformable"),
        ("neck", "none"),
        ("encoder_attn", "deformable"),
        ("decoder_attn", "deformable"),
        ("input_norm", "group"),
        ("relation", "none"),
        ("encoder_updates", "full"),
        ("enc_fusion", "none"),
        ("scores", "sigmoid"),
    ):
        value = str(options.get(name, "" if name == "backbone" else usual))
        if not re.fullmatch(usual, value):
            only = "only torchvision's ResNets and the paper's transformer"
            return f"{name} '{value}', {only}"
    recipes = {name.split(".")[1] for name in state_dict if name.startswith(_OF_RECIPES)}
    needed = sorted(name for name in recipes if RECIPES[name].detects)
    needed += [name for name, usual in _ONLY_OURS.items() if options.get(name, usual) != usual]
    return f"{needed[0]}, without which these weights detect nothing" if needed else ""


def published_weights(
    state_dict: Mapping[str, Tensor], options: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of the published model, and the names of those that recipes added.

    Raises:
        CheckpointError: other implementations have no such model.
    """
    if lacking := lacking_elsewhere(state_dict, options):
        raise CheckpointError(
            f"{path}: cannot be written: other implementations have no {lacking}. Keep our own "
            "checkpoint."
        )
    left_out = [name for name in state_dict if name.startswith(_OF_RECIPES)]
    return {
        name: tensor.detach().cpu()
        for name, tensor in state_dict.items()
        # batch norms are frozen there, and count nothing
        if not name.endswith("num_batches_tracked") and name not in left_out
    }, left_out
