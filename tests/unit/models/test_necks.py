"""Necks, against torchvision, timm and formulas."""

from collections import OrderedDict
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from timm.layers.cbam import ChannelAttn
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from configs.schema import LossConfig, ModelConfig
from models.backbones import Backbone
from models.build import build_criterion, build_model
from models.necks import NECKS, NeckOptions
from models.necks.fpn import FPN
from models.necks.hsfpn import HSFPN, ChannelAttention
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import perturb, random_images, small_config, small_model
from util.batch import pad_images
from util.errors import ConfigError

WIDTH, CHANNELS = 16, (16, 24, 40)
SIZES = [(13, 18), (7, 9), (4, 5), (2, 3)]


def count(modules: Any) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def test_fpn_is_torchvision_s_with_the_projections_as_its_lateral_layers() -> None:
    torch.manual_seed(0)
    ours = NECKS["fpn"](NeckOptions(WIDTH, 4, CHANNELS, None)).double()
    assert isinstance(ours, FPN)
    theirs = FeaturePyramidNetwork([WIDTH] * 4, WIDTH).double()
    with torch.no_grad():
        for inner, layer, smooth in zip(
            theirs.inner_blocks, theirs.layer_blocks, ours.smooth, strict=True
        ):
            inner[0].weight.copy_(torch.eye(WIDTH)[:, :, None, None])
            inner[0].bias.zero_()
            layer[0].load_state_dict(smooth.state_dict())
    maps = [torch.randn(2, WIDTH, *size).double() for size in SIZES]
    expected = theirs(OrderedDict((str(i), m) for i, m in enumerate(maps))).values()
    torch.testing.assert_close(ours(maps), list(expected))


def test_channel_attention_is_timm_s() -> None:
    torch.manual_seed(0)
    ours, theirs = ChannelAttention(64).double(), ChannelAttn(64, rd_ratio=0.25).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 64, 5, 7).double()
    torch.testing.assert_close(ours(x) * x, theirs(x))


def test_hsfpn_has_the_published_numbers_of_parameters() -> None:
    neck = NECKS["hsfpn"](NeckOptions(256, 4, (512, 1024, 2048), None))
    assert isinstance(neck, HSFPN)
    assert count([neck.select, neck.project]) == 13_108_224
    assert count([neck.weigh]) == 98_304
    assert count([neck.enlarge]) == 1_770_240
    assert count([neck.smooth]) == 2_362_368
    assert count([neck.input_proj()]) == 15_742_976


@pytest.mark.long
def test_a_detector_with_hsfpn_has_what_the_published_one_uses() -> None:
    model = build_model(ModelConfig(neck="hsfpn", num_queries=100), num_classes=91)
    # that one also has projections and a pyramid that nothing reads
    assert count([model]) == 70_430_241 - 3_020_032


def test_hsfpn_is_what_its_formulas_say() -> None:
    torch.manual_seed(0)
    neck = NECKS["hsfpn"](NeckOptions(WIDTH, 4, CHANNELS, 32)).double()
    assert isinstance(neck, HSFPN)
    perturb(neck)
    maps = [
        torch.randn(2, k, *size).double() for k, size in zip([*CHANNELS, 32], SIZES, strict=True)
    ]
    state = neck.state_dict()

    def weights(name: str, x: Tensor) -> Tensor:
        first, second = (state[f"{name}.{fc}.weight"][:, :, 0, 0] for fc in ("fc1", "fc2"))
        pooled = (x.flatten(2).mean(2), x.flatten(2).max(2).values)
        mean, most = ((v @ first.T).clamp(min=0) @ second.T for v in pooled)
        gate: Tensor = (mean + most).sigmoid()
        return gate[..., None, None]

    u = [
        torch.einsum("nkhw,ck->nchw", x * weights(f"select.{i}", x),
                     state[f"project.{i}.weight"][:, :, 0, 0])
        + state[f"project.{i}.bias"][:, None, None]
        for i, x in enumerate(maps)
    ]  # fmt: skip
    chain, expected = u[3], [u[3]]
    for level in (2, 1, 0):
        chain = F.conv_transpose2d(
            chain, state[f"enlarge.{level}.weight"], state[f"enlarge.{level}.bias"],
            stride=2, padding=1, output_padding=1,
        )  # fmt: skip
        h = F.interpolate(chain, size=SIZES[level], mode="bilinear", align_corners=False)
        expected.insert(0, weights(f"weigh.{level}", h) * u[level] + h)
    for i, x in enumerate(expected):
        prefix = f"smooth.{i}"
        y = F.conv2d(x, state[f"{prefix}.0.weight"], state[f"{prefix}.0.bias"], padding=1)
        norm = (state[f"{prefix}.1.{name}"] for name in ("weight", "bias"))
        expected[i] = F.group_norm(y, 8, *norm).clamp(min=0)
    torch.testing.assert_close(neck(maps), expected)


@pytest.mark.long
@pytest.mark.parametrize("levels", [3, 4, 6])
@pytest.mark.parametrize("options", [{"neck": "fpn"}, {"neck": "hsfpn", "neck_width": 48}], ids=str)
def test_every_parameter_learns_in_any_number_of_levels(
    options: dict[str, Any], levels: int
) -> None:
    torch.manual_seed(0)
    model = small_model(**options, num_feature_levels=levels).train()
    targets = random_targets([2, 1], 5)
    outputs = model(pad_images(random_images((64, 96), (50, 70))))
    torch.autograd.backward(build_criterion(LossConfig())(outputs, targets)["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_width_of_the_top_is_an_option_and_twice_the_last_map_s_without_it() -> None:
    for given, expected in ((48, 48), (None, None)):
        model = build_model(small_config(neck="hsfpn", neck_width=given), num_classes=5)
        last = cast(Backbone, model.backbone[0])
        top = model.input_proj[3].get_submodule("2")
        assert isinstance(top, nn.Conv2d)
        assert top.out_channels == (expected or 2 * last.channels[-1])
        assert [type(module) for module in model.input_proj[:3]] == [nn.Identity] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": "hsfpn", "num_feature_levels": 1}, "neck hsfpn: needs a coarse level"),
        ({"neck": "fpn", "neck_width": 64}, "neck_width: has no effect without `neck hsfpn`"),
        ({"neck": "hsfpn", "neck_width": 60}, "neck_width: must be a multiple of 8, not 60"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(small_config(**options), num_classes=5)
