"""ResNets of torchvision, as DETR uses them."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from models.backbones.registry import Backbone, BackboneOptions, register_backbone
from models.layers import FrozenBatchNorm2d
from util.errors import CheckpointError, ConfigError, nearest_hint
from util.safe_load import load_safely

_CHANNELS = {
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "resnet101": (256, 512, 1024, 2048),
}
_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


class ResNetBackbone(nn.Module):
    """A ResNet that returns its last map or its last three (strides 8, 16, 32)."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, options: BackboneOptions) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if options.train_norm else FrozenBatchNorm2d
        network = getattr(torchvision.models, options.variant)(
            replace_stride_with_dilation=[False, False, options.dilation], norm_layer=norm
        )
        load_resnet_weights(network, options)
        first = 4 if options.single_level else 2
        wanted = {f"layer{i}": str(i) for i in range(first, 5)}
        self.body = IntermediateLayerGetter(network, return_layers=wanted)
        self.channels = _CHANNELS[options.variant][first - 1 :]
        last_stride = 16 if options.dilation else 32
        self.strides = (last_stride,) if options.single_level else (8, 16, last_stride)
        for stage in _STAGES[: options.frozen_stages]:
            for name in stage:
                self.body[name].requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride], finest first."""
        return list(self.body(images).values())


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
                f"--backbone_weights imagenet: download of {options.variant} failed ({error}). "
                f"Fetch {enum['IMAGENET1K_V1'].url} elsewhere and pass the file."
            ) from error
    else:
        state = load_safely(Path(options.weights))
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"--backbone_weights {options.weights}: expected the state dict of "
                f"{options.variant}, got a {type(state).__name__}."
            )
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    if not options.train_norm:
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    expected = {key for key in network.state_dict() if not key.startswith("fc.")}
    odd = sorted(expected.symmetric_difference(state))
    if odd:
        raise CheckpointError(
            f"--backbone_weights {options.weights}: expected torchvision {options.variant}, "
            f"key '{odd[0]}' and {len(odd) - 1} more do not fit. Pass that network's state dict."
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"--backbone_weights {options.weights}: does not fit {options.variant}: {reason}"
        ) from error


@register_backbone("torchvision")
def create_resnet(options: BackboneOptions) -> Backbone:
    """Build a torchvision ResNet."""
    if options.variant not in _CHANNELS:
        raise ConfigError(
            f"--backbone {options.variant}: unknown torchvision backbone. "
            f"{nearest_hint(options.variant, _CHANNELS)} Others: timm/NAME."
        )
    if options.dilation and options.variant in ("resnet18", "resnet34"):
        raise ConfigError("--dilation: resnet18 and resnet34 have none. Use resnet50.")
    return ResNetBackbone(options)
