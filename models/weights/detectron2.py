"""ResNets under detectron2's names, as torchvision's where they are the same network.

Its model zoo begins with Caffe's networks. They take BGR images from 0 to 255, and have their
strides in the first convolution of a block, where torchvision has them in the second. The first
could be converted exactly, but no weights make up for the second: these are refused.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.weights.unwrap import state_dicts
from util.console import log
from util.errors import CheckpointError

_SIGN = "res2.0.conv1.weight"
_CAFFE_SIGN = "res2_0_branch2a_w"
_STEM_NORM = "stem.conv1.norm."
_CAFFE_AUTHORS = ("Caffe2", "Detectron2 Model Zoo")
_NEAR = 1e-3  # of 1, from which Caffe's variances differ by the norm's epsilon
_STEM = re.compile(r"stem\.(conv1\.norm\.|)(.+)")
_BLOCK = re.compile(r"res([2-5])\.(\d+)\.(?:conv(\d)|(shortcut))\.(norm\.|)(.+)")


def with_torchvision_names(content: Any, source: str) -> Any:
    """Return what a file holds; of detectron2's ResNets, the weights under torchvision's names.

    Raises:
        CheckpointError: it is a network of Caffe's kind, which computes something else.
    """
    author = str(content.get("__author__", "")) if isinstance(content, Mapping) else ""
    for _, tensors in state_dicts(content):
        if _CAFFE_SIGN in tensors:
            raise _refusal(source, "the names of its weights are Caffe2's")
        sign = next((key for key in tensors if f".{key}".endswith(f".{_SIGN}")), None)
        if sign is None:
            continue
        prefix = sign.removesuffix(_SIGN)
        body = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if author in _CAFFE_AUTHORS:
            raise _refusal(source, f"it says that it is by '{author}'")
        if _has_trivial_norm(body):
            raise _refusal(source, "its norms have means of 0 and variances of 1")
        log.info(
            f"{source}: a ResNet under detectron2's names{f' by {author[:40]!r}' * bool(author)}, "
            "read as torchvision's: for RGB images, with strides in the 3x3 convolutions"
        )
        return {_torchvision_name(key): tensor for key, tensor in body.items()}
    return content


def _torchvision_name(name: str) -> str:
    """Return what torchvision calls a tensor; other names stay."""
    if stem := _STEM.fullmatch(name):
        norm, rest = stem.groups()
        return f"bn1.{rest}" if norm else rest
    if block := _BLOCK.fullmatch(name):
        stage, number, conv, shortcut, norm, rest = block.groups()
        part = f"downsample.{int(bool(norm))}" if shortcut else f"{'bn' if norm else 'conv'}{conv}"
        return f"layer{int(stage) - 1}.{number}.{part}.{rest}"
    return name


def _has_trivial_norm(body: Mapping[str, Tensor]) -> bool:
    """Return whether the first norm only scales and shifts, as in networks converted from Caffe."""
    mean, variance = (body.get(f"{_STEM_NORM}running_{name}") for name in ("mean", "var"))
    if mean is None or variance is None:
        return False
    return not mean.any() and bool(torch.all((variance - 1).abs() < _NEAR))


def _refusal(source: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: a ResNet of Caffe's kind, as detectron2's model zoo has ({why}): it takes BGR "
        "images of 0..255, and has its strides in other convolutions than torchvision's, so here "
        "it would compute something else. Use `backbone_weights` imagenet, or a conversion of "
        "torchvision's or timm's weights."
    )
