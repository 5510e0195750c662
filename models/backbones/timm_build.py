"""Any network of timm as a backbone: its weights, what is frozen, and whether it takes any size."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from models.backbones import BACKBONES, Backbone, BackboneOptions, weights_from_file
from models.backbones.depthwise import exempt_depthwise
from models.backbones.timm_model import TimmBackbone
from models.weights.unwrap import keys_of
from util.errors import CheckpointError, ConfigError, nearest_hint

_PROBE_SIZE = (75, 107)  # a multiple of nothing, as images are


@BACKBONES.register("timm")
def create_timm(options: BackboneOptions) -> Backbone:
    """Build a timm network that returns its last map or its last three."""
    body = _create_body(options, 1 if options.single_level else 3)
    for module in body.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(in_precision_of_weights)
    exempt_depthwise(body)
    _freeze(body, options.frozen_stages)
    config: Any = timm.get_pretrained_cfg(options.variant)
    return TimmBackbone(
        body,
        mean=tuple(config.mean) if config else IMAGENET_DEFAULT_MEAN,
        std=tuple(config.std) if config else IMAGENET_DEFAULT_STD,
        train_norm=options.train_norm,
    )


def _create_body(options: BackboneOptions, count: int) -> Any:
    name, weights = options.variant, options.weights
    if not timm.is_model(name):
        raise ConfigError(
            f"backbone timm/{name}: timm has no such model. "
            f"{nearest_hint(name, timm.list_models())}"
        )
    options.refuse_for(f"timm/{name}")
    of_file = weights not in ("none", "imagenet")
    given = None
    if of_file:  # the names of the whole network: those of its features alone may differ
        names = timm.create_model(name, pretrained=False).state_dict()
        given = weights_from_file(weights, f"timm/{name}", names)
    # else the windows of a Swin are laid out for one size of image
    more: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
    if options.drop_path:
        more["drop_path_rate"] = options.drop_path
    try:
        body = timm.create_model(
            name,
            features_only=True,
            out_indices=tuple(range(-count, 0)),
            pretrained=weights != "none",
            pretrained_cfg_overlay=None if given is None else {"state_dict": given},
            **more,
        )
    except Exception as error:  # timm and the hub raise many kinds; all mean "not loaded"
        raise CheckpointError(
            f"`backbone timm/{name}`: cannot be built: {' '.join(str(error).split())[:300]} "
            "Pass a local file as `backbone_weights FILE`, or none to start from scratch."
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
            f"{place}: only {arrived} of {len(heavy)} tensors of timm/{name} are in the file. Keys "
            f"found: {keys_of(given)}; expected: {keys_of(body.state_dict())}. Give the weights of "
            "that network."
        )


def _accept_any_size(body: nn.Module, name: str) -> None:
    """Make the network pad images to whole patches, and try it on an uneven size.

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
        with torch.enable_grad():  # whatever the caller has set
            maps = body.eval()(torch.zeros(1, 3, height, width))
            total = torch.stack([m.sum() for m in maps]).sum()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"backbone timm/{name}: the network refuses images of {height} x {width} "
            f"({' '.join(str(error).split())[:100]}). Choose one that takes any size."
        ) from error
    body.train()
    parameters = list(body.parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.requires_grad_(gradient is not None)


def _freeze(body: Any, stages: int) -> None:
    """Freeze the stem (1), the first stage too (2), or everything (5).

    The stem ends at stride 2, the first stage at stride 4; all that stands before a frozen module
    is frozen, too.
    """
    if stages > 2:
        body.requires_grad_(False)
    if stages not in (1, 2):
        return
    frozen = [i["module"] for i in body.feature_info.info if i["reduction"] <= 2**stages]
    prefixes = tuple(p for m in frozen for p in (f"{m}.", f"{m.replace('.', '_')}."))
    named = list(body.named_modules())
    ends = [i for i, (name, _) in enumerate(named) if f"{name}.".startswith(prefixes)]
    for _, module in named[: max(ends, default=-1) + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def in_precision_of_weights(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Exempt a layer norm from autocast, see `models.layers.ExactLayerNorm`: a hook before it."""
    x, *rest = inputs
    if norm.weight is None or not torch.is_autocast_enabled(x.device.type):
        return inputs
    return (x.to(norm.weight.dtype), *rest)  # type: ignore[arg-type]
