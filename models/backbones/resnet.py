"""ResNets of torchvision, as DETR uses them."""

from pickle import UnpicklingError
from typing import cast

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from models.backbones import BACKBONES, Backbone, BackboneOptions, weights_from_file
from models.backbones.deformable_conv import OFFSETS, make_deformable
from models.layers import checkpointed
from models.weights.unwrap import keys_of
from util.errors import CheckpointError, ConfigError, nearest_hint

_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Return a convolution, which has no bias of its own, and its norm.

    A frozen norm becomes part of the convolution's weights: its own pass over the map, and its
    copy of the map for the backward pass, are saved.

    Shape: x [N,C,H,W].
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        output: Tensor = norm(conv(x))
        return output
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    convolved: Tensor = conv._conv_forward(x, weight, bias)
    return convolved


class Residual(nn.Module):
    """A residual block of torchvision whose norms may be part of their convolutions."""

    expansion: int
    downsample: nn.Sequential | None
    convolutions: int

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N,C,H,W] -> [N,C',H/stride,W/stride]."""
        out = x
        for index in range(1, self.convolutions + 1):
            if index > 1:
                out = F.relu(out, inplace=True)
            out = conv_norm(out, getattr(self, f"conv{index}"), getattr(self, f"bn{index}"))
        skipped = x
        if self.downsample is not None:
            conv, norm = self.downsample
            assert isinstance(conv, nn.Conv2d)
            skipped = conv_norm(x, conv, norm)
        out += skipped
        return F.relu(out, inplace=True)


class ResidualBasic(Residual, BasicBlock):  # type: ignore[misc]
    """Two convolutions (ResNet-18 and 34)."""

    convolutions = 2


class ResidualBottleneck(Residual, Bottleneck):  # type: ignore[misc]
    """Three convolutions, the stride in the second (ResNet-50 and 101)."""

    convolutions = 3


_BLOCKS: dict[str, tuple[type[Residual], list[int]]] = {
    "resnet18": (ResidualBasic, [2, 2, 2, 2]),
    "resnet34": (ResidualBasic, [3, 4, 6, 3]),
    "resnet50": (ResidualBottleneck, [3, 4, 6, 3]),
    "resnet101": (ResidualBottleneck, [3, 4, 23, 3]),
}


class ResNetBackbone(nn.Module):
    """A ResNet that returns its last map or its last three (strides 8, 16, 32)."""

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    checkpointing = False

    def __init__(self, options: BackboneOptions) -> None:
        super().__init__()
        block, counts = _BLOCKS[options.variant]
        network = torchvision.models.ResNet(
            block,
            counts,
            replace_stride_with_dilation=[False, False, options.dilation],
            norm_layer=nn.BatchNorm2d if options.train_norm else FrozenBatchNorm2d,
        )
        if options.dcn != "none":
            for number in options.dcn_stages:
                make_deformable(network.get_submodule(f"layer{number - 1}"), options.dcn)
        load_resnet_weights(network, options)
        self.body = nn.ModuleDict(
            {name: network.get_submodule(name) for stage in _STAGES for name in stage}
        )
        self._first = 4 if options.single_level else 2
        width = 64 * block.expansion
        self.channels = tuple(width * 2**i for i in range(self._first - 1, 4))
        self.strides = (4, 8, 16, 16 if options.dilation else 32)[self._first - 1 :]
        for stage in _STAGES[: options.frozen_stages]:
            for name in stage:
                self.body[name].requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride], finest first."""
        stem = self.body["conv1"]
        assert isinstance(stem, nn.Conv2d)
        x = F.relu(conv_norm(images, stem, self.body["bn1"]), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for index in range(1, 5):
            for block in cast(nn.Sequential, self.body[f"layer{index}"]):
                x = checkpointed(block, x, enabled=self.checkpointing)
            if index >= self._first:
                maps.append(x)
        return maps


def load_resnet_weights(network: nn.Module, options: BackboneOptions) -> None:
    """Fill a torchvision ResNet from ImageNet weights or a file.

    Offsets of deformable convolutions, which a plain network lacks, then stay as they are.

    Raises:
        CheckpointError: the download failed, or the file does not hold this network.
    """
    if options.weights == "none":
        return
    if options.weights == "imagenet":
        enum = torchvision.models.get_model_weights(options.variant)
        try:
            state = enum["IMAGENET1K_V1"].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # cut, or not the file
            raise CheckpointError(
                f"`backbone_weights imagenet`: download of {options.variant} failed ({error}). "
                f"Fetch {enum['IMAGENET1K_V1'].url} elsewhere and pass the file."
            ) from error
    else:
        state = weights_from_file(options.weights, options.variant, network.state_dict())
    # heads are left out; old files lack the counters, which frozen norms do not have
    parts = {name for name, _ in network.named_children()} - {"fc"}
    found = list(state)
    state = {key: tensor for key, tensor in state.items() if key.partition(".")[0] in parts}
    expected, given = (
        {k for k in keys if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
        for keys in (network.state_dict(), state)
    )
    if not any(OFFSETS in key for key in given):
        expected = {key for key in expected if OFFSETS not in key}
    differing = sorted(expected.symmetric_difference(given))
    if differing:
        which = "missing" if differing[0] in expected else "not in the network"
        raise CheckpointError(
            f"`backbone_weights {options.weights}`: does not hold torchvision's {options.variant}: "
            f"'{differing[0]}' is {which}, and {len(differing) - 1} more keys do not fit. "
            f"Keys found: {keys_of(found)}; expected: {keys_of(list(network.state_dict()))}."
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"`backbone_weights {options.weights}`: does not fit {options.variant}: "
            f"{' '.join(str(error).split())}"
        ) from error


@BACKBONES.register("torchvision")
def create_resnet(options: BackboneOptions) -> Backbone:
    """Build a torchvision ResNet."""
    if options.variant not in _BLOCKS:
        raise ConfigError(
            f"backbone {options.variant}: torchvision has no such ResNet. "
            f"{nearest_hint(options.variant, _BLOCKS)} Others: timm/NAME."
        )
    if options.dilation and options.variant in ("resnet18", "resnet34"):
        raise ConfigError("dilation: resnet18 and resnet34 have none. Use resnet50.")
    if options.drop_path:
        raise ConfigError(
            "drop_path: has no effect on a ResNet, only on transformers. Leave it out."
        )
    return ResNetBackbone(options)
