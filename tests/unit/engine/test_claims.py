"""The sizes that a file states of its model, against those of its weights."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from configs.schema import ModelConfig
from engine.claims import check_claims
from models.build import build_model
from models.recipes.hybrid import Options
from models.weights.official import check_sizes
from tests.unit.models.small import VARIANTS, small_config
from util.errors import CheckpointError, ConfigError

SIZES = {  # every size that weights show -> one that they do not have
    "hidden_dim": 72, "num_feature_levels": 3, "enc_layers": 1, "dec_layers": 10**9,
    "dim_feedforward": 47, "enc_n_points": 4, "dec_n_points": 1, "num_queries": 2**36,
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The options and the weights of a small model."""
    config = small_config(**VARIANTS[request.param])
    return config, build_model(config, num_classes=5).state_dict()


@pytest.mark.long
def test_true_sizes_pass(model: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, weights = model
    check_sizes(weights, asdict(config), "x.pth")
    check_claims(config, weights, "x.pth")


@pytest.mark.parametrize("name", SIZES)
def test_another_size_than_that_of_the_weights_is_named(
    model: tuple[ModelConfig, dict[str, Tensor]], name: str
) -> None:
    config, weights = model
    if name == "num_queries" and config.two_stage:  # they are the best proposals, no weights
        return
    with pytest.raises(CheckpointError, match=f"^x.pth: states `{name} {SIZES[name]}`, but its"):
        check_sizes(weights, {**asdict(config), name: SIZES[name]}, "x.pth")


@pytest.mark.parametrize("value", ["none", True, "64", -1, float("nan"), [64], "digits"])
def test_a_size_of_any_kind_is_one_line(value: Any) -> None:
    weights = {"transformer.level_embed": torch.zeros(4, 64)}
    if value == "none":
        check_sizes(weights, {"hidden_dim": None}, "x.pth")
        return
    value = 10**5000 if value == "digits" else value
    with pytest.raises(CheckpointError) as caught:
        check_sizes(weights, {"hidden_dim": value}, "x.pth")
    assert len(str(caught.value)) < 300


@pytest.mark.long
@pytest.mark.parametrize(
    "claim",
    [
        {"hidden_dim": 8192},
        {"dim_feedforward": 65536, "enc_layers": 100, "hidden_dim": 1024},
        {"num_queries": 100_000, "hidden_dim": 4096},
        pytest.param(
            {"backbone": "timm/vit_7b_patch16_dinov3"},
            marks=pytest.mark.skipif(
                not timm.is_model("vit_7b_patch16_dinov3"), reason="older timm has no such model"
            ),
        ),
        {"backbone": "timm/regnety_2560"},
        {"backbone": "dat_tiny", "dat_stride": 2, "hidden_dim": 8192},
        {"backbone": "timm/regnety_2560", "drop_path": 0.1},
    ],
)
def test_a_model_that_the_file_cannot_hold_is_refused(claim: dict[str, Any]) -> None:
    """Without the weights that show sizes, `check_sizes` cannot tell."""
    config = small_config()
    weights = build_model(config, num_classes=5).state_dict()
    del weights["transformer.level_embed"]
    with pytest.raises(CheckpointError, match="describes a model of [0-9,]+ weights, but holds"):
        check_claims(replace(config, **claim), weights, "x.pth")


@pytest.mark.long
def test_numbers_that_tensors_share_count_once() -> None:
    shared = torch.zeros(1)
    weights = {f"{i}": shared.expand(10**6) for i in range(1000)}
    with pytest.raises(CheckpointError, match="but holds 1\\."):
        check_claims(small_config(hidden_dim=4096), weights, "x.pth")


@pytest.mark.long
def test_parts_may_be_missing_and_recipes_count() -> None:
    config = small_config()
    weights = build_model(config, num_classes=5).state_dict()
    check_claims(config, {k: v for k, v in weights.items() if "backbone" not in k}, "x.pth")
    check_claims(config, weights, "x.pth", recipes={"hybrid": Options()})
    with pytest.raises(CheckpointError, match="describes a model"):
        check_claims(replace(config, hidden_dim=2048), {}, "x.pth", recipes={"hybrid": Options()})


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="timm has no such model"):
        check_claims(small_config(backbone="timm/none"), {}, "x.pth")
