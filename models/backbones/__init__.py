"""Backbones: images to feature maps, each kind in a file of its own, chosen by name."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from models.weights.detectron2 import with_torchvision_names
from models.weights.unwrap import find_weights, keys_of, largest_state_dict
from util.console import log
from util.errors import CheckpointError
from util.registry import Registry
from util.tensor_files import load_safely


@dataclass(frozen=True)
class BackboneOptions:
    """What a backbone is built from.

    `single_level`: only the last map, else the last three. `weights`: "imagenet", "none" or a
    file. `frozen_stages`: 0 none, 1 stem, 2 stem and first stage, 5 all. `train_norm`: batch
    norms learn, else they stay as loaded.
    """

    variant: str
    single_level: bool = False
    dilation: bool = False
    weights: str = "none"
    frozen_stages: int = 2
    train_norm: bool = False


class Backbone(Protocol):
    """Map images to feature maps, finest level first."""

    channels: tuple[int, ...]  # per returned map
    strides: tuple[int, ...]  # input pixels per cell
    mean: tuple[float, float, float]  # of the images it was trained on, 0..1, RGB
    std: tuple[float, float, float]
    checkpointing: bool  # activations are computed again in the backward pass, not kept

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride]."""


BACKBONES: Registry[Callable[[BackboneOptions], Backbone]] = Registry(
    "backbone source", __name__, {"torchvision": ".resnet", "timm": ".timm_build"}
)


def create_backbone(
    name: str,
    *,
    single_level: bool = False,
    dilation: bool = False,
    weights: str = "none",
    frozen_stages: int = 2,
    train_norm: bool = False,
) -> Backbone:
    """Build the backbone called 'source/variant'; a bare name is torchvision's.

    Raises:
        ConfigError: unknown name, or weights that are missing or do not fit.
    """
    source, _, variant = name.rpartition("/") if "/" in name else ("torchvision", "", name)
    return BACKBONES[source](
        BackboneOptions(variant, single_level, dilation, weights, frozen_stages, train_norm)
    )


def weights_from_file(file: str, network: str, expected: Collection[str]) -> Mapping[str, Tensor]:
    """Read the weights of a network of this name, however another program has wrapped them.

    Where most of the `expected` names are missing, it is the part of the file with most tensors.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    place = f"`backbone_weights {file}`"
    content = with_torchvision_names(load_safely(Path(file)), place)
    found = find_weights(content, expected, place)
    tensors = found.tensors if found else largest_state_dict(content)
    if not tensors:
        kind = type(content).__name__
        keys = f" with the keys {keys_of(content)}" if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"{place}: holds a {kind}{keys}, not a state dict. Give the weights of {network}."
        )
    if found and found.place:
        log.info(f"{place}: weights of {network} found in it: {found.place}")
    return tensors
