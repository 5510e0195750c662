"""Backbones: images to feature maps, each kind in a file of its own, chosen by name."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from models.weights.detectron2 import with_torchvision_names
from models.weights.unwrap import find_weights, keys_of, largest_state_dict
from util.console import log
from util.errors import CheckpointError, ConfigError
from util.registry import Registry
from util.tensor_files import load_safely


@dataclass(frozen=True)
class BackboneOptions:
    """What a backbone is built from.

    `single_level`: only the last map, else the last three. `weights`: "imagenet", "none" or a
    file. `frozen_stages`: 0 none, 1 stem, 2 stem and first stage, 5 all. `train_norm`: batch
    norms learn, else they stay as loaded. `drop_path`: how often the deepest block of a transformer
    is left out. `dilation` and `dcn` are of ResNets alone, `dat_grid` and `dat_stride` of DAT.
    """

    variant: str
    single_level: bool = False
    dilation: bool = False
    weights: str = "none"
    frozen_stages: int = 2
    train_norm: bool = False
    dcn: Literal["none", "v1", "v2"] = "none"
    dcn_stages: tuple[int, ...] = (3, 4, 5)
    drop_path: float = 0.0
    dat_grid: Literal["corrected", "published"] = "corrected"
    dat_stride: int = 1

    def refuse_for(self, network: str) -> None:
        """Refuse, for a network of this name, what only a ResNet has.

        Raises:
            ConfigError: one of these options is set.
        """
        for name, asked in (("dilation", self.dilation), ("dcn", self.dcn != "none")):
            if asked:
                raise ConfigError(f"{name}: not for {network}. Use a torchvision ResNet.")


class Backbone(Protocol):
    """Map images to feature maps, finest level first."""

    channels: tuple[int, ...]  # per returned map
    strides: tuple[int, ...]  # input pixels per cell
    mean: tuple[float, float, float]  # of the images it was trained on, 0..1, RGB
    std: tuple[float, float, float]
    checkpointing: bool  # activations are computed again in the backward pass, not kept

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride].

        One with an attribute `reads_padding` that is true gets the padding, too: [N,H,W], True =
        padding.
        """


BACKBONES: Registry[Callable[[BackboneOptions], Backbone]] = Registry(
    "backbone source",
    __name__,
    {
        "torchvision": ".resnet",
        "timm": ".timm_build",
        "dat": ".dat",
        "dilateformer": ".dilateformer",
    },
)


def create_backbone(name: str, **options: Any) -> Backbone:
    """Build the backbone called 'source/variant', with other fields of `BackboneOptions`.

    In the name of one of our own, as dat_tiny, the source ends at "_"; another bare name is
    torchvision's.

    Raises:
        ConfigError: unknown name, or weights that are missing or do not fit.
    """
    source, slash, variant = name.rpartition("/")
    if not slash:
        source, _, variant = name.partition("_")
        if source not in BACKBONES.modules:
            source, variant = "torchvision", name
    return BACKBONES[source](BackboneOptions(variant, **options))


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
