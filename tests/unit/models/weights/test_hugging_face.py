"""Models made and saved by transformers itself, read into ours: same keys, same predictions."""

import copy
import functools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import ModelConfig
from models.build import build_model
from models.layers import sine_embedding
from models.recipes.hybrid import Options
from models.weights.class_names import COCO_CATEGORIES, coco_logit_classes
from models.weights.hugging_face import (
    config_classes,
    config_options,
    save_hugging_face,
    to_hugging_face,
    to_official,
)
from models.weights.load import load_pretrained
from models.weights.transfer import load_strict
from tests.lanes import some
from tests.unit.models.small import perturb, small_config
from util.batch import pad_images
from util.classes import Classes
from util.errors import CheckpointError

SMALL: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 7,
    "two_stage_num_proposals": 6,
    "num_labels": 5,
}
OWN_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
TIMM: dict[str, Any] = {"use_timm_backbone": True, "backbone": "resnet18"}
OWN: dict[str, Any] = {"use_timm_backbone": False, "backbone_config": OWN_RESNET}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": TIMM,
    "refine": TIMM | {"with_box_refine": True},
    "two_stage": TIMM | {"with_box_refine": True, "two_stage": True},
    "own_plain": OWN,
    "own_two_stage": OWN | {"with_box_refine": True, "two_stage": True},
    "learned_single_scale": TIMM | {"position_embedding_type": "learned", "num_feature_levels": 1},
}


def hf_model(**options: Any) -> Any:
    """Return a random transformers model in evaluation mode; no tensor has its initial value."""
    model = copy.deepcopy(_hf_model(json.dumps(options)))
    torch.manual_seed(1)
    return model


@functools.lru_cache(maxsize=len(VARIANTS))
def _hf_model(options: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(**SMALL | json.loads(options))
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return model


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_model_predicts_the_same_here(tmp_path: Path, variant: str) -> None:
    theirs = hf_model(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    assert pretrained.kind == "hugging_face"
    ours = build_model(ModelConfig(**pretrained.model_options), num_classes=5).eval()
    load_strict(ours, pretrained.state_dict, "folder")
    # Their two-stage model may take padding for a proposal; ours never does.
    second = (96, 96) if "two_stage" in variant else (80, 64)
    batch = pad_images([torch.randn(3, 96, 96), torch.randn(3, *second)])
    with torch.no_grad():
        expected = theirs(batch.images, pixel_mask=(~batch.mask).long())
        output = ours(batch)
    torch.testing.assert_close(output["pred_logits"], expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output["pred_boxes"], expected.pred_boxes, atol=1e-4, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_own_names_of_version_5_are_read_and_every_weight_goes_back(variant: str) -> None:
    model = hf_model(**VARIANTS[variant])
    native = model.state_dict()
    options = config_options(json.loads(model.config.to_json_string()), "x")
    converted = to_official(native, options, "x")
    renamed = to_hugging_face(converted, timm_backbone="backbone" in VARIANTS[variant])
    again = to_official(renamed, options, "x")
    assert again.keys() == converted.keys()
    assert all(again[key].equal(converted[key]) for key in converted)
    assert values_of(renamed) == values_of(native)


def values_of(state_dict: dict[str, torch.Tensor]) -> set[tuple[Any, ...]]:
    """Return what identifies each tensor, whatever its name."""
    return {(tuple(t.shape), float(t.sum()), float(t.abs().sum())) for t in state_dict.values()}


@pytest.mark.parametrize("variant", ["two_stage", "own_plain"])
def test_transformers_reads_what_we_rename(tmp_path: Path, variant: str) -> None:
    theirs = hf_model(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    renamed = to_hugging_face(pretrained.state_dict, timm_backbone=variant == "two_stage")
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    expected = theirs.state_dict()
    assert all(tensor.equal(expected[key]) for key, tensor in again.state_dict().items())
    assert load_pretrained(str(tmp_path)).state_dict.keys() == pretrained.state_dict.keys()


def test_foreign_and_incomplete_keys_are_refused() -> None:
    options = {"dec_layers": 2, "with_box_refine": False, "two_stage": False}
    with pytest.raises(CheckpointError, match=r"model\.mask_head\.weight"):
        to_official({"model.mask_head.weight": torch.ones(1)}, options, "x")
    lone = {"model.decoder.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match="lacks a projection"):
        to_official(lone, options, "x")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "detr"}, "model_type is detr; only deformable_detr"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"encoder_ffn_dim": 8, "decoder_ffn_dim": 9}, "decoder_ffn_dim is 9; only 8"),
        ({"backbone_config": {"model_type": "swin"}}, "backbone swin"),
        ({"backbone_config": OWN_RESNET | {"depths": [1, 1, 1, 1]}}, r"\[1, 1, 1, 1\]"),
        ({"backbone_config": OWN_RESNET | {"downsample_in_bottleneck": True}}, "ResNet 18"),
    ],
)
def test_unsupported_configs_are_refused(change: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        config_options(change, "folder")


@pytest.mark.parametrize(
    ("config", "backbone"),
    [
        ({}, "resnet50"),
        ({"backbone": "resnet101.a1_in1k"}, "resnet101"),
        ({"backbone": "microsoft/resnet-50", "use_timm_backbone": False}, "resnet50"),
        ({"backbone": "convnext_tiny"}, "timm/convnext_tiny"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet34"}}, "resnet34"),
    ],
)
def test_backbone_names(config: dict[str, Any], backbone: str) -> None:
    assert config_options(config, "x")["backbone"] == backbone


def test_classes_of_published_and_own_models() -> None:
    unused = {str(i): "N/A" for i in range(91)}
    published = unused | {str(i): name for i, name in COCO_CATEGORIES.items()}
    assert config_classes({"id2label": published}, 91) == coco_logit_classes()
    own = config_classes({"id2label": {"0": "cat", "1": "N/A"}}, 3)
    assert own.ids == (0, 1, 2)
    assert own.names == ("cat", "", "")


@pytest.mark.parametrize(
    "size", [{"shortest_edge": 480, "longest_edge": 600}, 480], ids=["edges", "old"]
)
def test_preprocessing_is_read(tmp_path: Path, size: Any) -> None:
    hf_model(**TIMM).save_pretrained(tmp_path)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "size": size, "max_size": 600}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    pretrained = load_pretrained(str(tmp_path))
    assert pretrained.image_mean == (0.1, 0.2, 0.3)
    assert pretrained.image_std == (1.0, 1.0, 1.0)
    assert pretrained.image_size == (480, 600)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"id2label": ["cat"]}),
        ("config.json", {"id2label": {"first": "cat"}}),
        ("config.json", {"backbone_config": "resnet"}),
        ("preprocessor_config.json", {"image_mean": [0.5]}),
        ("preprocessor_config.json", {"size": {"shortest_edge": "x", "longest_edge": 9}}),
    ],
    ids=str,
)
def test_configs_with_invalid_values_are_one_line_errors(
    tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    hf_model(**TIMM).save_pretrained(tmp_path)
    file = tmp_path / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))
    with pytest.raises(CheckpointError, match=rf"{name}: is not a valid Hugging Face") as caught:
        load_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="has neither model.safetensors nor"):
        load_pretrained(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("source", ["hf:someone/some-model", "someone/some-model"])
def test_an_unreachable_hub_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="pass its folder") as caught:
        load_pretrained(source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{source}: ")


OURS: dict[str, dict[str, Any]] = {
    "plain": {"backbone": "resnet18"},
    "two_stage": {"backbone": "resnet18", "with_box_refine": True, "two_stage": True},
    "single_scale_dc5": {"backbone": "resnet50", "num_feature_levels": 1, "dilation": True},
    "learned": {"backbone": "resnet18", "position_embedding": "learned", "with_box_refine": True},
}


@pytest.mark.long
@pytest.mark.parametrize("variant", some(OURS, "two_stage"))
def test_transformers_loads_what_we_save_and_predicts_the_same(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    config = small_config(**OURS[variant])
    recipes = {"hybrid": Options(num_queries_one2many=9)}
    model = build_model(config, num_classes=3, recipes=recipes).double().eval()
    perturb(model)
    classes = Classes((2, 5, 9), ("café", "", "dog"))
    left_out = save_hugging_face(
        tmp_path / "saved",
        model.state_dict(),
        options=asdict(config),
        classes=classes,
        image_mean=model.backbone.mean,
        image_std=model.backbone.std,
        image_size=(64, 96),
    )
    extra = "recipes.hybrid.query_embed.weight"
    assert left_out == ([] if variant == "two_stage" else [extra])
    theirs, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float64
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # learned positions are there by the name of 4.x, too
    assert all("model.backbone.position_embedding" in key for key in info["unexpected_keys"])
    if variant == "two_stage":  # their own rounds to float32
        theirs.model.get_proposal_pos_embed = lambda boxes: sine_embedding(
            boxes.sigmoid() * 2 * math.pi, config.hidden_dim // 2
        ).flatten(-2)
    images = torch.randn(2, 3, 128, 96, dtype=torch.float64)  # without padding, see above
    with torch.no_grad():
        expected = theirs.eval()(images, pixel_mask=torch.ones(2, 128, 96, dtype=torch.long))
        output = model(pad_images(list(images)))
    torch.testing.assert_close(output["pred_logits"], expected.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output["pred_boxes"], expected.pred_boxes, atol=1e-9, rtol=1e-9)
    assert theirs.config.id2label == {0: "café", 1: "N/A", 2: "dog"}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (64, 96)
    again = load_pretrained(str(tmp_path / "saved"))
    assert again.classes.names == classes.names
    assert again.image_size == (64, 96)
    rebuilt = build_model(ModelConfig(**again.model_options), num_classes=3).double()
    load_strict(rebuilt, again.state_dict, "saved")
    for name, value in rebuilt.state_dict().items():
        assert value.equal(model.state_dict()[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "timm/x"},
        {"backbone": "resnet50", "encoder": "mine"},
        {"backbone": "resnet50", "dcn": "v2"},
    ],
)
def test_a_model_that_transformers_lacks_is_not_written(
    tmp_path: Path, options: dict[str, str]
) -> None:
    with pytest.raises(CheckpointError, match="other implementations have no"):
        save_hugging_face(
            tmp_path / "saved", {}, options=options, classes=Classes((), ()),
            image_mean=(), image_std=(), image_size=(1, 1),
        )  # fmt: skip
    assert not (tmp_path / "saved").exists()
