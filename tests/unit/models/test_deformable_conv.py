"""Deformable convolutions in a ResNet, beside their definition written out."""

import itertools
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn

from configs.schema import ModelConfig, OptimConfig
from engine.build import build_optimizer, check_offsets
from models.backbones import create_backbone
from models.backbones.deformable_conv import OFFSETS, DeformableConv2d, Version
from models.build import build_model
from tests.unit.models.small import small_config
from util.errors import CheckpointError, ConfigError

versions = pytest.mark.parametrize("version", ["v1", "v2"])
GEOMETRIES: list[dict[str, Any]] = [{"stride": 1}, {"stride": 2}, {"dilation": 2, "padding": 2}]


def create(name: str = "resnet18", **options: Any) -> nn.Module:
    return cast(nn.Module, create_backbone(name, **options))


def convolution(version: Version, **geometry: Any) -> tuple[nn.Conv2d, DeformableConv2d]:
    """Return a plain float64 convolution and a deformable one with its weights."""
    plain = nn.Conv2d(3, 4, 3, **({"padding": 1} | geometry)).double()
    return plain, DeformableConv2d(plain, version).double()


def bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    """Return the value between cells, zero outside. Shape: plane [H,W]."""
    total = plane.new_zeros(())
    for row, column in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
            total = total + plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


@versions
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_is_the_sum_of_the_papers(version: Version, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, conv = convolution(version, **geometry)
    for parameter in conv.conv_offset.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    stride, dilation = plain.stride[0], plain.dilation[0]
    padding = int(plain.padding[0])
    computed, found = conv.conv_offset(x).detach(), conv(x)
    assert found.shape == plain(x).shape
    assert plain.bias is not None
    for n, o, i, j in itertools.product(*map(range, found.shape)):
        expected = plain.bias[o]
        for k in range(9):
            dy, dx = (float(computed[n, 2 * k + axis, i, j]) for axis in (0, 1))
            y = i * stride - padding + k // 3 * dilation + dy
            column = j * stride - padding + k % 3 * dilation + dx
            m = computed[n, 18 + k, i, j].sigmoid() if version == "v2" else 1.0
            for c in range(3):
                w = plain.weight[o, c, k // 3, k % 3]
                expected = expected + w * m * bilinear(x[n, c], y, column)
        torch.testing.assert_close(found[n, o, i, j], expected)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_starts_as_the_plain_convolution_or_half_of_it(geometry: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    plain, v1 = convolution("v1", bias=False, **geometry)
    _, v2 = convolution("v2", bias=False, **geometry)
    v2.weight = plain.weight
    torch.testing.assert_close(v1(x), plain(x))
    torch.testing.assert_close(v2(x), plain(x) / 2)


@pytest.mark.long
@pytest.mark.parametrize(("name", "dilation"), [("resnet18", False), ("resnet50", True)])
def test_a_fresh_v1_network_is_the_plain_one(name: str, dilation: bool) -> None:
    options: dict[str, Any] = {"single_level": dilation, "dilation": dilation}
    plain, deformable = (create(name, dcn=d, **options).double() for d in ("none", "v1"))
    missing = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys
    assert all(OFFSETS in key for key in missing.missing_keys)
    images = torch.randn(1, 3, 75, 107, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(deformable(images), plain(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("stages", "count"), [((3, 4, 5), 13), ((5,), 3), ((3, 5), 7)])
def test_the_3x3_of_every_block_of_the_stages_is_deformable(
    stages: tuple[int, ...], count: int
) -> None:
    backbone = create("resnet50", dcn="v2", dcn_stages=stages)
    found = [n for n, m in backbone.named_modules() if isinstance(m, DeformableConv2d)]
    assert len(found) == count
    assert {int(name.split(".")[1].removeprefix("layer")) + 1 for name in found} == set(stages)
    assert all(name.endswith("conv2") for name in found)


@pytest.mark.long
@versions
def test_weights_of_a_plain_network_load_and_those_of_a_deformable_one(
    version: Version, tmp_path: Path
) -> None:
    plain = torchvision.models.resnet18().state_dict()
    torch.save(plain, tmp_path / "plain.pth")
    backbone = create(dcn=version, weights=str(tmp_path / "plain.pth"))
    state = {key.removeprefix("body."): value for key, value in backbone.state_dict().items()}
    for key, value in state.items():
        expected = torch.zeros_like(value) if OFFSETS in f".{key}" else plain[key]
        assert torch.equal(value, expected), key
    trained = {key: torch.randn_like(value) for key, value in state.items()}
    torch.save(trained, tmp_path / "trained.pth")
    loaded = create(dcn=version, weights=str(tmp_path / "trained.pth")).state_dict()
    assert all(torch.equal(loaded[f"body.{key}"], value) for key, value in trained.items())
    cut = {k: v for k, v in trained.items() if "layer4.1.conv2.conv_offset" not in k}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"layer4\.1\.conv2\.conv_offset\.bias' is missing"):
        create(dcn=version, weights=str(tmp_path / "cut.pth"))
    with pytest.raises(CheckpointError, match="conv_offset.bias' is not in the network"):
        create(weights=str(tmp_path / "trained.pth"))


@pytest.mark.long
def test_a_frozen_norm_is_part_of_the_deformable_convolution() -> None:
    torch.manual_seed(0)
    frozen = create(dcn="v2")
    for name, tensor in frozen.state_dict().items():
        if "running_mean" in name or "conv_offset" in name or "bn" in name.split(".")[-2]:
            tensor.uniform_(0.5, 1.5)
            if "conv_offset" in name:
                tensor.mul_(0.01)
    trained = create(dcn="v2", train_norm=True).eval()
    trained.load_state_dict(frozen.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(frozen.double()(images.double()), trained.double()(images.double()),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b)


def test_autocast_leaves_places_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    plain, conv = convolution("v2")
    conv = conv.float()
    nn.init.normal_(conv.conv_offset.weight)
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, conv(x))


def test_two_layers_see_81_places_instead_of_25() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 1, 61, 61, requires_grad=True)
    for spread, places in ((0, {25}), (9, set(range(60, 82)))):
        seen = x
        for _ in range(2):
            conv = DeformableConv2d(nn.Conv2d(1, 1, 3, padding=1, bias=False), "v1")
            nn.init.ones_(conv.weight)
            # whole cells, so that a sample is one cell; at each place its own
            offsets = torch.randint(-spread, spread + 1, (1, 18, 61, 61)).float()
            conv.conv_offset.register_forward_hook(lambda *_, offsets=offsets: offsets)
            seen = conv(seen)
        (gradient,) = torch.autograd.grad(seen[0, 0, 30, 30], x)
        assert int((gradient != 0).sum()) in places


@pytest.mark.parametrize("norm_weight_decay", [None, 0.0])
def test_offsets_learn_at_a_rate_of_their_own(norm_weight_decay: float | None) -> None:
    model = build_model(small_config(backbone="resnet18", dcn="v1"), num_classes=5)
    options = OptimConfig(
        lr_backbone=1e-3, lr_dcn_mult=0.25, norm_weight_decay=norm_weight_decay, weight_decay=0.5
    )
    optimizer, _ = build_optimizer(model, options, 10)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    offsets = {n: group_of[p] for n, p in model.named_parameters() if OFFSETS in n}
    assert len(offsets) == 2 * 6
    for name, group in offsets.items():
        assert group["lr"] == 2.5e-4
        apart = name.endswith("bias") and norm_weight_decay is not None
        assert group["weight_decay"] == (0.0 if apart else 0.5)
    backbone = [g for g in optimizer.param_groups if g["name"] == "backbone"]
    assert [g["lr"] for g in backbone] == [1e-3]


def test_offsets_that_can_never_learn_are_refused() -> None:
    model = build_model(small_config(backbone="resnet18", dcn="v2"), num_classes=5, frozen_stages=5)
    with pytest.raises(ConfigError, match="dcn: the backbone is frozen"):
        check_offsets(model)
    check_offsets(build_model(small_config(backbone="resnet18", dcn="v2"), num_classes=5))


def test_wrong_options_are_errors_of_one_line() -> None:
    with pytest.raises(ConfigError, match="dcn: not for timm/resnet18. Use a torchvision ResNet."):
        create_backbone("timm/resnet18", dcn="v1")
    with pytest.raises(ConfigError, match="dcn_stages: needs at least one stage"):
        ModelConfig(dcn="v1", dcn_stages=())
    with pytest.raises(ConfigError, match="dcn_stages: must be one of 3, 4, 5"):
        ModelConfig(dcn="v1", dcn_stages=(2,))  # type: ignore[arg-type]
