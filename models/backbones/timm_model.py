"""Any timm network that gives feature maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.format import Format
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from models.backbones.registry import BACKBONES, Backbone, BackboneOptions
from models.recompute import checkpointed
from util.errors import CheckpointError, ConfigError, nearest_hint
from util.tensor_files import load_safely

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_PROBE_SIZE = (75, 107)  # a multiple of nothing, as images are


class TimmBackbone(nn.Module):
    """A timm `features_only` network that returns its last map or its last three."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    checkpointing = False

    def __init__(self, options: BackboneOptions) -> None:
        super().__init__()
        self.train_norm = options.train_norm
        self.body: Any = _create_body(options, 1 if options.single_level else 3)
        self.channels = tuple(int(c) for c in self.body.feature_info.channels())
        self.strides = tuple(int(r) for r in self.body.feature_info.reduction())
        config: Any = timm.get_pretrained_cfg(options.variant)
        self.mean = tuple(config.mean) if config else IMAGENET_MEAN
        self.std = tuple(config.std) if config else IMAGENET_STD
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(_in_precision_of_weights)
        self._freeze(options.frozen_stages)
        if not options.train_norm:
            for norm in self._norms():
                norm.requires_grad_(False)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, (nn.BatchNorm2d, BatchNormAct2d))]

    def _freeze(self, stages: int) -> None:
        # "stem" ends at stride 2, the first stage at stride 4; 5 stages are everything
        if stages == 0:
            return
        named = list(self.body.named_modules())
        limit = {1: 2, 2: 4}.get(stages, 10**9)
        frozen = [i["module"] for i in self.body.feature_info.info if i["reduction"] <= limit]
        prefixes = tuple(p for m in frozen for p in (f"{m}.", f"{m.replace('.', '_')}."))
        ends = [i for i, (name, _) in enumerate(named) if f"{name}.".startswith(prefixes)]
        last = len(named) - 1 if stages > 2 else max(ends, default=-1)
        for _, module in named[: last + 1]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set training mode; norms that do not learn stay in evaluation mode."""
        super().train(mode)
        if not self.train_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride], finest first."""
        maps = list(checkpointed(self.body, images, enabled=self.checkpointing))
        if getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return maps


def _in_precision_of_weights(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Exempt a layer norm from autocast, see `models.layers.ExactLayerNorm`."""
    x, *rest = inputs
    if norm.weight is None or not torch.is_autocast_enabled(x.device.type):
        return inputs
    return (x.to(norm.weight.dtype), *rest)  # type: ignore[arg-type]


def _create_body(options: BackboneOptions, count: int) -> Any:
    name, weights = options.variant, options.weights
    if not timm.is_model(name):
        raise ConfigError(
            f"backbone timm/{name}: timm has no such model. "
            f"{nearest_hint(name, timm.list_models())}"
        )
    if options.dilation:
        raise ConfigError(f"dilation: not for timm/{name}. Use a torchvision ResNet.")
    given = None if weights in ("none", "imagenet") else load_safely(Path(weights))
    if given is not None and not isinstance(given, Mapping):
        raise CheckpointError(
            f"`backbone_weights {weights}`: holds a {type(given).__name__}, not a state dict. Give "
            f"the weights of timm/{name}."
        )
    options_of_timm: dict[str, Any] = {
        "features_only": True,
        "out_indices": tuple(range(-count, 0)),
        "pretrained": weights != "none",
        "pretrained_cfg_overlay": None if given is None else {"state_dict": given},
    }
    if name.startswith("swin"):  # else its windows are laid out for one size of image
        options_of_timm["strict_img_size"] = False
    try:
        body = timm.create_model(name, **options_of_timm)
    except Exception as error:  # timm and the hub raise many kinds; all mean "not loaded"
        reason = " ".join(str(error).split())[:300]
        hint = "Pass a local file as `backbone_weights FILE`, or none to start from scratch."
        raise CheckpointError(
            f"`backbone timm/{name}`: cannot be built: {reason} {hint}"
        ) from error
    if given is not None:
        _check_arrival(body, given, f"`backbone_weights {weights}`", name)
    _accept_any_size(body, name)
    return body


def _check_arrival(body: nn.Module, given: Mapping[str, Tensor], place: str, name: str) -> None:
    """Raise CheckpointError if most of the network is not from the file.

    timm passes over keys that it does not find; names differ between a network and its features,
    so that tensors are recognised by shape and sum.
    """

    def mark(tensor: Tensor) -> tuple[tuple[int, ...], float]:
        return tuple(tensor.shape), float(tensor.double().sum())

    known = {mark(t) for t in given.values() if isinstance(t, Tensor) and t.dim() > 1}
    heavy = [p.detach() for p in body.parameters() if p.dim() > 1]
    arrived = sum(mark(p) in known for p in heavy)
    if arrived < 0.9 * len(heavy):
        raise CheckpointError(
            f"{place}: only {arrived} of {len(heavy)} tensors of timm/{name} are in the file. "
            "Give the weights of that network."
        )


def _accept_any_size(body: nn.Module, name: str) -> None:
    """Make the network pad images to whole patches, and try it on an odd size.

    A parameter that no map depends on, such as the norm of a head cut off, is one that does not
    learn: distributed training waits for the gradient of every other.

    Raises:
        ConfigError: the network reads images of one size only.
    """
    for module in body.modules():
        if isinstance(module, PatchEmbed):
            module.strict_img_size, module.dynamic_img_pad = False, True
    height, width = _PROBE_SIZE
    try:
        maps = body.eval()(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"backbone timm/{name}: the network refuses images of {height} x {width} "
            f"({' '.join(str(error).split())[:100]}). Choose one that takes any size."
        ) from error
    body.train()
    parameters = list(body.parameters())
    total = torch.stack([m.sum() for m in maps]).sum()
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.requires_grad_(gradient is not None)


@BACKBONES.register("timm")
def create_timm(options: BackboneOptions) -> Backbone:
    """Build a timm network."""
    return TimmBackbone(options)
