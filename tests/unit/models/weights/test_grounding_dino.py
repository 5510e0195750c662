"""Weights of Grounding DINO in a detector of ours: what arrives, and what is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import ModelConfig
from models.build import build_model
from models.weights.load import load_pretrained
from models.weights.transfer import TransferReport, transfer
from tests.unit.models.weights.grounding import save_folder
from util.classes import Classes
from util.errors import CheckpointError

SMALL = {"backbone": "timm/test_resnet"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("grounding")
    save_folder(place)
    return place


def started(folder: Path, **options: Any) -> tuple[TransferReport, dict[str, Tensor]]:
    """Start a detector of two classes; return the report and the detector's weights."""
    pretrained = load_pretrained(str(folder))
    config = ModelConfig(**{**pretrained.model_options, **SMALL, **options})
    torch.manual_seed(1)
    model = build_model(config, num_classes=2)
    report = transfer(
        model,
        pretrained.state_dict,
        source_classes=pretrained.classes,
        target_classes=Classes((1, 2), ("kettle", "mug")),
        backbone=False,
        proposal_scores="classes",
    )
    return report, model.state_dict()


def test_the_config_sets_the_options(folder: Path) -> None:
    pretrained = load_pretrained(str(folder))
    assert ModelConfig(**pretrained.model_options) == ModelConfig(
        backbone="resnet50", encoder_attn="enhancer", decoder_tokens=True, hidden_dim=32, nheads=4,
        enc_layers=2, dec_layers=3, dim_feedforward=16, num_queries=9, enc_n_points=2,
        dec_n_points=3, with_box_refine=True, two_stage=True, mixed_query_selection=True,
        class_proposals=True, look_forward_twice=True, query_position="box", decoder_norm=True,
        shared_heads=True, position_temperature=20.0, position_offset=0.0, refine_eps=1e-5,
    )  # fmt: skip
    assert pretrained.other_backbone
    assert pretrained.image_size == (96, 160)
    assert len(pretrained.classes) == 0


def test_published_swins_are_those_of_timm(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"] |= {"embed_dim": 96, "depths": [2, 2, 6, 2], "window_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    options = load_pretrained(str(tmp_path)).model_options
    assert options["backbone"] == "timm/swin_tiny_patch4_window7_224"


def test_all_but_classes_arrives_and_texts_are_left_out(folder: Path) -> None:
    report, found = started(folder)
    of_classes = {name for name in found if "class_embed." in name or "class_tokens" in name}
    # the maps of this backbone have other widths
    projections = {f"input_proj.{level}.0.weight" for level in range(4)}
    assert set(report.reinitialised) == of_classes | projections
    assert report.ignored
    assert all(name.startswith("text_") for name in report.ignored)
    assert "text_backbone" in report.table()
    assert not report.adapted


def test_each_box_head_of_its_own_layer_arrives(tmp_path: Path) -> None:
    theirs = save_folder(tmp_path, decoder_bbox_embed_share=False)
    _, found = started(tmp_path)
    for layer in range(3):
        expected = theirs.bbox_embed[layer].layers[0].weight
        assert found[f"bbox_embed.{layer}.layers.0.weight"].equal(expected)
        assert found[f"transformer.decoder.bbox_embed.{layer}.layers.0.weight"].equal(expected)
    proposals = theirs.model.encoder_output_bbox_embed.layers[0].weight
    assert found["bbox_embed.3.layers.0.weight"].equal(proposals)
    assert not found["bbox_embed.0.layers.0.weight"].equal(found["bbox_embed.1.layers.0.weight"])


def test_a_plain_encoder_takes_the_deformable_part(folder: Path) -> None:
    report, _ = started(folder, encoder_attn="deformable", decoder_tokens=False)
    fresh = {name for name in report.reinitialised if "class_embed." not in name}
    assert not any(name.startswith("transformer.") for name in fresh)
    left_out = {name.split(".")[2] for name in report.ignored if name.startswith("transformer.enc")}
    assert left_out == {"fusions", "token_layers"}
    assert any(".token_attn." in name for name in report.ignored)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation_function", "gelu", "activation_function is gelu; only relu"),
        ("two_stage", False, "two_stage is False; only True"),
        ("decoder_ffn_dim", 32, "decoder_ffn_dim is 32; only 16"),
    ],
)
def test_what_we_lack_is_refused(
    folder: Path, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(str(tmp_path))


def test_a_weight_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"'model\.extra\.weight' is not a weight of Ground"):
        load_pretrained(str(tmp_path))
