"""DETR: Hugging Face's outputs, weights and what it refuses."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from configs.load import read_options
from configs.schema import ModelConfig
from models.build import build_model
from models.weights.load import load_pretrained
from models.weights.transfer import load_strict, transfer
from tests.lanes import as_published
from tests.unit.models.small import perturb, random_images, small_config, small_model
from tests.unit.models.weights import published_keys
from util.batch import pad_images
from util.classes import Classes
from util.errors import CheckpointError, ConfigError

SMALL: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_queries": 7, "num_labels": 5, "use_timm_backbone": True, "backbone": "resnet18",
}  # fmt: skip
DENSE: dict[str, Any] = {
    "num_feature_levels": 1, "encoder_attn": "dense", "decoder_attn": "dense",
    "input_norm": "none", "position_offset": 0.0, "decoder_norm": True,
}  # fmt: skip
# Hugging Face's names of modules -> those of DETR's repository, in which norms are numbered in the
# order of use.
REPOSITORY = (
    (r"model\.backbone\.(?:conv_encoder\.)?model\.", "backbone.0.body."),
    (r"model\.(encoder|decoder)\.layers\.", r"transformer.\1.layers."),
    (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(\.encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(\.decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"model\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"class_labels_classifier\.", "class_embed."),
    (r"bbox_predictor\.", "bbox_embed."),
    (r"model\.query_position_embeddings\.", "query_embed."),
    (r"model\.input_projection\.", "input_proj."),
)


def hugging_face(**options: Any) -> Any:
    """Return a perturbed model of transformers in evaluation mode."""
    torch.manual_seed(0)
    library: Any = transformers  # its annotations lack much
    config = library.DetrConfig(**SMALL | options)
    model = library.DetrForObjectDetection(config).eval()
    perturb(model)
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"dilation": True, "backbone": "resnet50"},
            marks=pytest.mark.skipif(
                not as_published(transformers.__version__),
                reason="older transformers: see as_published",
            ),
        ),
    ],
    ids=["plain", "DC5"],
)
def test_a_folder_of_hugging_face_predicts_the_same_here(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = hugging_face(**options)
    theirs.save_pretrained(tmp_path)
    assert_alike(theirs, tmp_path)


def assert_alike(theirs: Any, file: Path) -> None:
    """Compare a model of transformers with ours of a file or folder, in float64."""
    pretrained = load_pretrained(str(file))
    assert len(pretrained.classes) == 5
    ours = build_model(ModelConfig(**pretrained.model_options), num_classes=5).eval()
    load_strict(ours, pretrained.state_dict, "given")
    ours, theirs = ours.double(), theirs.double()
    batch = pad_images(random_images((96, 120), (80, 64)))
    with torch.no_grad():
        expected = theirs(batch.images, pixel_mask=(~batch.mask).long())
        found = ours(batch)
    shares = expected.logits.softmax(-1)[..., :-1]
    torch.testing.assert_close(found["pred_logits"].sigmoid(), shares)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes)


@pytest.mark.long
def test_a_file_of_the_repository_predicts_what_hugging_face_does(tmp_path: Path) -> None:
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    weights: dict[str, Tensor] = {}
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        name = key
        for pattern, ours in REPOSITORY:
            name = re.sub(pattern, ours, name)
        weights[name] = tensor
    for query in [name for name in weights if ".q_proj." in name]:
        parts = [weights.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        weights[query.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    args = argparse.Namespace(backbone="resnet18", dilation=False, nheads=4, pre_norm=False)
    torch.save({"model": weights, "args": args}, tmp_path / "detr.pth")
    assert_alike(theirs, tmp_path / "detr.pth")


def test_a_model_of_the_preset_has_the_published_number_of_parameters() -> None:
    config = read_options("configs/detr_r50.yaml", {}).config().model
    model = build_model(replace(config, scores="softmax"), num_classes=91)
    learned = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(learned.values()) == 41_302_368  # which the official code prints
    assert "transformer.level_embed" not in learned
    assert not model.transformer.level_embed.any()


def test_no_object_goes_with_the_classes_to_a_model_of_others() -> None:
    torch.manual_seed(0)
    source, target = (
        build_model(small_config(**DENSE, scores="softmax"), num_classes=n) for n in (3, 2)
    )
    perturb(source)
    classes = Classes((1, 2, 3), ("cat", "dog", "cow")), Classes((1, 2), ("cow", "sheep"))
    transfer(target, source.state_dict(), source_classes=classes[0], target_classes=classes[1])
    given, rows = (m.state_dict() for m in (source, target))
    assert rows["class_embed.0.weight"][0].equal(given["class_embed.0.weight"][2])
    for kind in ("weight", "bias"):
        key = f"class_embed.0.no_object.{kind}"
        assert rows[key].equal(given[key])


def test_queries_see_the_whole_image_and_start_without_content() -> None:
    model = small_model(**DENSE)
    assert model.query_embed is not None
    assert model.query_embed.weight.shape == (7, 64)
    assert not any("reference_points" in name for name in model.state_dict())
    images = random_images((96, 96))
    images[0].requires_grad_()
    with torch.enable_grad():
        model(pad_images(images))["pred_boxes"][0, 0].sum().backward()
    assert images[0].grad is not None
    assert (images[0].grad != 0).all(0).all()


@pytest.mark.parametrize(
    "options", [{"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}], ids=str
)
def test_boxes_to_begin_with_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="decoder_attn dense: queries have no boxes"):
        small_config(decoder_attn="dense", **options)


def published_file(path: Path) -> dict[str, Tensor]:
    """Write a file with the keys and shapes of DETR's repository; return its weights."""
    torch.manual_seed(0)
    weights = {theirs: torch.randn(shape) for theirs, _, shape in published_keys.detr()}
    args = argparse.Namespace(backbone="resnet18", dilation=False, nheads=8, pre_norm=False)
    torch.save({"model": weights, "args": args}, path)
    return weights


def test_every_tensor_of_a_file_of_the_repository_arrives(tmp_path: Path) -> None:
    weights = published_file(tmp_path / "detr.pth")
    pretrained = load_pretrained(str(tmp_path / "detr.pth"))
    config = ModelConfig(**pretrained.model_options)
    assert config == ModelConfig(
        **DENSE, scores="softmax", backbone="resnet18", hidden_dim=32, dim_feedforward=24,
        enc_layers=2, dec_layers=3, num_queries=7, nheads=8,
    )  # fmt: skip
    assert len(pretrained.classes) == 91  # ids of COCO's categories
    found = pretrained.state_dict
    for theirs, ours, _ in published_keys.detr():
        given = weights[theirs]
        if theirs.startswith("class_embed."):
            kind = theirs.split(".")[1]
            parts = found[ours], found[f"class_embed.0.no_object.{kind}"]
            assert torch.cat(parts).equal(given), theirs
        else:
            assert found[ours].equal(given), theirs
    load_strict(build_model(config, num_classes=91), found, "file")


def test_norms_before_attention_are_refused(tmp_path: Path) -> None:
    weights = published_file(tmp_path / "w.pth")
    weights["transformer.encoder.norm.weight"] = torch.zeros(32)
    torch.save({"model": weights}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="norms before attention"):
        load_pretrained(str(tmp_path / "w.pth"))
