"""A detector whose heavy layers compute in half precision, with islands that stay in float32."""

import copy
from typing import Any

from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from models.deformable_detr import DeformableDETR

# Of these parts, convolutions and linear layers are halved. What is outside of them is an island:
# position encodings, proposals and their ranking, reference points, classes and boxes.
_PARTS = (
    "backbone.0.", "input_proj.", "neck.", "transformer.encoder.", "transformer.decoder.layers.",
)  # fmt: skip
# Layers inside of them that are islands, too: half precision is too coarse for places and shares.
# Those of `nn.MultiheadAttention`, norms and all that is no layer are none of the halved kinds, nor
# are timm's depthwise convolutions (`models.backbones.depthwise`): few weights, no matrix products.
_ISLANDS = frozenset({
    "sampling_offsets", "attention_weights", "conv_offset", "qkv", "to_qkv", "proj_qkv", "proj_q",
    "proj_k", "proj_v",
})  # fmt: skip
_KINDS = (nn.Linear, nn.Conv2d, Conv2dSame)
ISLANDS = (
    "norms, softmax, dense attention, depthwise convolutions of timm, positions, sampling points "
    "and their weights, proposals, scores and boxes"
)


def halved(model: DeformableDETR) -> tuple[DeformableDETR, int]:
    """Return a copy that computes its heavy layers in float16, and how many these are.

    Their weights are float16, and so is what they multiply; what they return is float32 again. A
    frozen norm becomes part of the convolution before it first, while all is float32.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        _merge_norms(parent)
    chosen = [module for name, module in model.named_modules() if _is_halved(name, module)]
    for module in chosen:
        module.half()
        module.register_forward_pre_hook(_to_half)
        module.register_forward_hook(_to_float)
    return model, len(chosen)


def _is_halved(name: str, module: nn.Module) -> bool:
    # of these very types: others, such as exact layers, are not computed as plain ones are
    plain = type(module) in _KINDS
    return plain and name.startswith(_PARTS) and _ISLANDS.isdisjoint(name.split("."))


def _merge_norms(parent: nn.Module) -> None:
    """Make frozen norms part of the convolutions that stand before them."""
    before: nn.Module | None = None
    for name, child in list(parent.named_children()):
        if isinstance(child, FrozenBatchNorm2d) and type(before) is nn.Conv2d:
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight,
                before.bias,
                child.running_mean,
                child.running_var,
                child.eps,
                child.weight,
                child.bias,
            )
            setattr(parent, name, nn.Identity())
        before = child


def _to_half(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.half() for x in inputs)


def _to_float(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()
