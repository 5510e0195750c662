"""The backbone contract, what is frozen, and what is refused."""

import functools
import math
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from models.backbones import create_backbone
from util.errors import CheckpointError, ConfigError

CONVOLUTIONAL = "timm/tf_efficientnet_lite0"
CHANNELS_LAST = ("timm/swin_tiny_patch4_window7_224", "timm/mambaout_femto")
HEIGHT, WIDTH = 75, 107  # a multiple of nothing


def create(name: str, **options: object) -> nn.Module:
    """Return a backbone as the module it is."""
    return cast(nn.Module, create_backbone(name, **options))


def trainable(backbone: nn.Module) -> set[str]:
    """Return the names of parameters that learn, without `body.`."""
    return {
        name.removeprefix("body.") for name, p in backbone.named_parameters() if p.requires_grad
    }


@pytest.mark.long
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "torchvision/resnet34", CONVOLUTIONAL, *CHANNELS_LAST]
)
def test_maps_have_the_stated_channels_and_strides(name: str, single: bool) -> None:
    backbone = create_backbone(name, single_level=single)
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, HEIGHT, WIDTH))
    assert len(maps) == len(backbone.channels) == len(backbone.strides) == (1 if single else 3)
    assert list(backbone.strides) == ([32] if single else [8, 16, 32])
    for feature, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        size = (math.ceil(HEIGHT / stride), math.ceil(WIDTH / stride))
        assert feature.shape == (2, channels, *size)
        assert feature.is_contiguous()


def test_last_level_alone_is_the_last_of_three() -> None:
    single, three = create("resnet18", single_level=True), create("resnet18")
    single.load_state_dict(three.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(single(images)[0], three(images)[-1])


def test_channels_last_is_known_from_the_network_not_from_the_sizes() -> None:
    backbone = create_backbone("timm/mambaout_femto", single_level=False)
    tall = torch.randn(1, 3, 8 * backbone.channels[0], 64)  # as many rows as channels
    with torch.no_grad():
        assert backbone(tall)[0].shape == (1, backbone.channels[0], backbone.channels[0], 8)


def test_a_backbone_built_where_nothing_is_recorded_learns_as_any_other() -> None:
    with torch.no_grad():
        made = create_backbone("timm/test_vit")
    learning, expected = (
        [p.requires_grad for p in cast(nn.Module, backbone).parameters()]
        for backbone in (made, create_backbone("timm/test_vit"))
    )
    assert learning == expected
    assert any(learning)


def test_dilation_halves_the_last_stride() -> None:
    dilated = create_backbone("resnet50", single_level=True, dilation=True)
    assert dilated.strides == (16,)
    with torch.no_grad():
        assert dilated(torch.randn(1, 3, 64, 96))[0].shape == (1, 2048, 4, 6)


@pytest.mark.parametrize(
    ("stages", "first"), [(0, "conv1"), (1, "layer1"), (2, "layer2"), (5, None)]
)
@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_stages_are_frozen_from_the_stem_on(name: str, stages: int, first: str | None) -> None:
    learning = {n.split(".")[0] for n in trainable(create(name, frozen_stages=stages))}
    order = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    assert learning == (set() if first is None else set(order[order.index(first) :]))


@pytest.mark.parametrize(
    ("name", "frozen", "first"),
    [
        (CONVOLUTIONAL, ("conv_stem", "blocks.0", "blocks.1"), "blocks.2"),
        ("timm/swin_tiny_patch4_window7_224", ("patch_embed", "layers_0"), "layers_1"),
    ],
)
def test_frozen_stages_of_timm_networks(name: str, frozen: tuple[str, ...], first: str) -> None:
    learning = trainable(create(name))
    assert not [n for n in learning if n.startswith(frozen)]
    assert [n for n in learning if n.startswith(first)]


@pytest.mark.parametrize("name", ["resnet18", CONVOLUTIONAL])
def test_frozen_parameters_get_no_gradient_and_norms_stay_put(name: str) -> None:
    backbone = create(name).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    maps = backbone(torch.randn(2, 3, 64, 64) * 3)
    torch.autograd.backward(torch.stack([m.square().mean() for m in maps]).sum())
    for parameter in backbone.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])
    images = torch.randn(2, 3, 64, 64)
    together, alone = backbone(images)[0], backbone(images[:1])[0]
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_norm", [False, True])
def test_frozen_layers_keep_nothing_for_the_backward_pass(train_norm: bool) -> None:
    backbone = create("resnet18", train_norm=train_norm).train()
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[0] == 2:
            kept[tensor.data_ptr()] = tuple(tensor.shape[1:])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = backbone(torch.randn(2, 3, 128, 128))
    assert [m.requires_grad for m in maps] == [True, True, True]
    large = [shape for shape in kept.values() if shape[1] >= 32]
    assert large == [(64, 32, 32)]  # what the frozen layers hand on


@pytest.mark.parametrize("name", ["resnet18", CONVOLUTIONAL])
def test_norms_learn_where_asked(name: str) -> None:
    backbone = create(name, frozen_stages=0, train_norm=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    mean = cast(Tensor, norms[0].running_mean).clone()
    backbone(torch.randn(2, 3, 64, 64) + 1)
    assert not torch.equal(cast(Tensor, norms[0].running_mean), mean)
    assert all(p.requires_grad for norm in norms for p in norm.parameters())


def test_resnet_equals_the_one_of_timm_with_the_same_weights() -> None:
    theirs = timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4)).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    ours = create("resnet18")
    state = {f"body.{key}": value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)  # batch counters are dropped by the frozen norm
    images = torch.randn(1, 3, HEIGHT, WIDTH)
    for a, b in zip(ours(images), theirs(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "Did you mean 'resnet18'?"),
        ("tim/resnet18", {}, "source tim: does not exist. Did you mean 'timm'?"),
        ("timm/tf_efficientnet_lite", {}, "timm has no such model. Did you mean 'tf_efficientnet"),
        ("resnet18", {"dilation": True}, "resnet18 and resnet34 have none. Use resnet50."),
        (CONVOLUTIONAL, {"dilation": True}, "dilation: not for timm/"),
        ("timm/vit_tiny_patch16_224", {}, "the network refuses images of 75 x 107"),
    ],
)
def test_backbones_that_cannot_be_built_are_one_line_errors(
    name: str, options: dict[str, bool], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        create_backbone(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", CONVOLUTIONAL])
def test_missing_weights_are_a_one_line_error(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file") as error:
        create_backbone(name, weights="nowhere.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("train_norm", [False, True])
def test_weights_come_from_a_file(tmp_path: Path, train_norm: bool) -> None:
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    backbone = create("resnet18", weights=str(tmp_path / "r18.pth"), train_norm=train_norm)
    loaded = backbone.state_dict()
    for key, value in network.state_dict().items():
        if not key.startswith("fc.") and (train_norm or not key.endswith("num_batches_tracked")):
            assert torch.equal(loaded[f"body.{key}"], value)


def test_weights_of_another_network_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    for name in ("resnet18", "resnet50"):
        with pytest.raises(CheckpointError, match=f"does not hold torchvision's {name}: ") as error:
            create_backbone(name, weights=str(tmp_path / "r34.pth"))
        assert "\n" not in str(error.value)


def test_weights_of_a_timm_network_come_from_a_file(tmp_path: Path) -> None:
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save(network.state_dict(), tmp_path / "lite0.pth")
    loaded = create(CONVOLUTIONAL, weights=str(tmp_path / "lite0.pth")).state_dict()
    known = network.state_dict()
    assert {k.removeprefix("body.") for k in loaded} <= set(known)
    assert all(torch.equal(v, known[k.removeprefix("body.")]) for k, v in loaded.items())


def test_a_file_that_holds_another_network_is_refused_for_timm(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="tensors of timm/") as error:
        create_backbone(CONVOLUTIONAL, weights=str(tmp_path / "other.pth"))
    assert "\n" not in str(error.value)


@functools.cache
def small_resnet() -> dict[str, torch.Tensor]:
    """Return the weights of a ResNet whose tensors all differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            key: torch.randn_like(value) if value.is_floating_point() else value
            for key, value in torchvision.models.resnet18().state_dict().items()
        }


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda s: {"epoch": 3, "arch": "resnet18", "state_dict": under("module.", s),
                    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
         "'state_dict', keys without 'module.'"),  # PyTorch's ImageNet example
        (lambda s: {"state_dict": under("module.encoder_q.", s)
                    | under("module.encoder_k.", {k: v + 1 for k, v in s.items()})},
         "'state_dict', keys without 'module.encoder_q.'"),  # MoCo
        (lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
         "'state_dict_ema'"),  # timm's training
        (lambda s: {"student": under("module.backbone.", {k: v + 1 for k, v in s.items()}),
                    "teacher": under("backbone.", s)},
         "'teacher', keys without 'backbone.'"),  # DINO
        (lambda s: {"state_dict": under("model.", s), "hyper_parameters": {"lr": 0.1}},
         "'state_dict', keys without 'model.'"),  # Lightning
        (lambda s: {"model": under("backbone.0.body.", s)},
         "'model', keys without 'backbone.0.body.'"),  # a DETR
        (lambda s: under("_orig_mod.", {k: v for k, v in s.items() if "tracked" not in k}),
         "keys without '_orig_mod.'"),  # torch.compile, and norms that count nothing
        (lambda s: s | {"projector.weight": torch.ones(2)}, ""),
    ],
)  # fmt: skip
def test_wrapped_weights_are_found_and_reported(
    wrap: Any, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, file = small_resnet(), tmp_path / "w.pth"
    torch.save(wrap(state), file)
    loaded = create("resnet18", weights=str(file)).state_dict()
    for key, value in state.items():
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            assert torch.equal(loaded[f"body.{key}"], value), key
    printed = capsys.readouterr().out.splitlines()
    said = [line for line in printed if "weights of resnet18" in line]
    assert [line.partition("found in it: ")[2] for line in said] == ([place] if place else [])


def test_two_indistinguishable_copies_are_refused(tmp_path: Path) -> None:
    state = small_resnet()
    torch.save({"a": state, "b": state}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds 2 copies of the network: 'a' and 'b'"):
        create_backbone("resnet18", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"stem.conv.weight": torch.ones(2)}},
         "missing, and 99 more keys do not fit. Keys found: 'stem.conv.weight'; expected: 'conv1"),
        ({"epoch": 3, "state_dict": {}}, "holds a dict with the keys 'epoch', 'state_dict', not a"),
        ([1], "holds a list, not a state dict"),
    ],
)  # fmt: skip
def test_the_error_lists_keys_found_and_expected(
    content: Any, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as error:
        create_backbone("resnet18", weights=str(tmp_path / "w.pth"))
    assert message in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_wrapped_weights_of_a_timm_network_are_found(tmp_path: Path) -> None:
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save({"state_dict": under("module.", network.state_dict())}, tmp_path / "w.pth")
    loaded = create(CONVOLUTIONAL, weights=str(tmp_path / "w.pth")).state_dict()
    known = network.state_dict()
    assert all(torch.equal(v, known[k.removeprefix("body.")]) for k, v in loaded.items())
