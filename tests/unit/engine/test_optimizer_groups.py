"""Which rate and weight decay each parameter of a detector has."""

from typing import cast

import pytest
import timm
import torch
from torch import nn

from configs.schema import OptimConfig
from engine.build import build_optimizer
from models.backbones import create_backbone
from models.deformable_detr import DeformableDETR
from tests.unit.models.small import small_model

Found = dict[str, tuple[float, float]]  # name: rate and weight decay
OPTIONS = {"lr": 1e-3, "lr_backbone": 1e-4, "lr_linear_proj_mult": 0.1, "weight_decay": 0.01}


def found(model: DeformableDETR, **options: float) -> Found:
    optimizer, _ = build_optimizer(model, OptimConfig(**OPTIONS, **options), 10)  # type: ignore[arg-type]
    of = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(of)
    return {
        name: (of[p]["lr"], of[p]["weight_decay"])
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def rate(name: str) -> float:
    if name.startswith("backbone."):
        return 1e-4
    return 1e-4 if "sampling_offsets" in name or "reference_points" in name else 1e-3


def test_weight_decay_holds_for_everything_by_default() -> None:
    groups = found(small_model())
    assert groups == {name: (rate(name), 0.01) for name in groups}
    optimizer, _ = build_optimizer(small_model(), OptimConfig(), 10)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["transformer", "backbone", "linear_proj"]


def test_norms_and_biases_may_have_their_own() -> None:
    model = small_model()
    norms = {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm))
        for name, _ in module.named_parameters()
    }
    groups = found(model, norm_weight_decay=0.0)
    assert norms < groups.keys()
    for name, (own_rate, decay) in groups.items():
        apart = name in norms or name.rpartition(".")[2] in ("bias", "in_proj_bias")
        assert (own_rate, decay) == (rate(name), 0.0 if apart else 0.01), name


@pytest.mark.parametrize("name", ["timm/swin_tiny_patch4_window7_224", "dat_tiny"])
def test_tables_of_relative_positions_do_not_decay(name: str) -> None:
    if name.startswith("timm/"):
        network = timm.create_model(name.removeprefix("timm/"), features_only=True)
    else:
        with torch.device("meta"):
            network = cast(nn.Module, create_backbone(name))
    model = nn.ModuleDict({"backbone": nn.ModuleList([network])})
    options = OptimConfig(weight_decay=0.05, norm_weight_decay=0.0)
    optimizer, _ = build_optimizer(model, options, 10)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tables = {name for name in named if "table" in name.rpartition(".")[2]}
    assert len(tables) >= 10
    for key, parameter in named.items():
        assert (decay[parameter] == 0) == (key in tables or parameter.dim() == 1), key


def test_decay_pulls_at_weights_alone() -> None:
    model = small_model()
    optimizer, _ = build_optimizer(
        model, OptimConfig(lr=0.1, weight_decay=0.5, norm_weight_decay=0.0), 10
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norm, weight = "transformer.decoder.layers.0.norm1.weight", "input_proj.0.0.weight"
    after = dict(model.named_parameters())
    assert after[norm].equal(before[norm])
    torch.testing.assert_close(after[weight], before[weight] * 0.95)
