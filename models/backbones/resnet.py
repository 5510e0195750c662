"""ResNets of torchvision, as DETR uses them."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.backbones import BACKBONES, Backbone, BackboneOptions
from models.layers import checkpointed
from util.errors import CheckpointError, ConfigError, nearest_hint
from util.tensor_files import load_safely

_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters never change."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # ImageNet weights come from an ordinary batch norm, which counts its batches.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def after(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Return this norm of `conv(x)` by one convolution with scaled weights.

        The norm's own pass over the map, and its copy of the map for the backward pass, are saved.
        Shape: x [N,C,H,W].
        """
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return F.conv2d(
            x,
            conv.weight * scale[:, None, None, None],
            self.bias - self.running_mean * scale,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Return a convolution, which has no bias of its own, and its norm. Shape: [N,C,H,W]."""
    if isinstance(norm, FrozenBatchNorm2d):
        return norm.after(conv, x)
    output: Tensor = norm(conv(x))
    return output


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

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    checkpointing = False

    def __init__(self, options: BackboneOptions) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if options.train_norm else FrozenBatchNorm2d
        block, counts = _BLOCKS[options.variant]
        network = torchvision.models.ResNet(
            block,
            counts,
            replace_stride_with_dilation=[False, False, options.dilation],
            norm_layer=norm,
        )
        load_resnet_weights(network, options)
        children = dict(network.named_children())
        self.body = nn.ModuleDict({name: children[name] for stage in _STAGES for name in stage})
        self._first = 4 if options.single_level else 2
        width = 64 * block.expansion
        self.channels = tuple(width * 2**i for i in range(self._first - 1, 4))
        last_stride = 16 if options.dilation else 32
        self.strides = (last_stride,) if options.single_level else (8, 16, last_stride)
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
                f"backbone_weights imagenet: download of {options.variant} failed ({error}). "
                f"Fetch {enum['IMAGENET1K_V1'].url} elsewhere and pass the file."
            ) from error
    else:
        state = load_safely(Path(options.weights))
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"backbone_weights {options.weights}: holds a {type(state).__name__}, not a state "
                f"dict. Give the weights of {options.variant}."
            )
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    if not options.train_norm:
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    expected = {key for key in network.state_dict() if not key.startswith("fc.")}
    odd = sorted(expected.symmetric_difference(state))
    if odd:
        raise CheckpointError(
            f"backbone_weights {options.weights}: '{odd[0]}' and {len(odd) - 1} more keys do not "
            f"fit torchvision's {options.variant}. Pass the state dict of that network."
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"backbone_weights {options.weights}: does not fit {options.variant}: {reason}"
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
    return ResNetBackbone(options)
