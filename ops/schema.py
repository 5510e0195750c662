"""Declare the op to PyTorch: schemas, shapes for tracing, autocast, and no second derivatives.

`torch.ops.msdeform` has two operators: the op, plain or fused, and its gradients. Their kernels are
in `ms_deform_attn.py`. Use `ops.ms_deform_attn` and `ops.fused_ms_deform_attn`, which check their
inputs first.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from .call import arithmetic_dtype

_create: Any = torch.library.Library  # untyped in PyTorch
library = _create("msdeform", "DEF")
_INPUTS = "Tensor value, SymInt[] spatial_shapes, Tensor points, Tensor weights, Tensor? reference"
library.define(f"ms_deform_attn({_INPUTS}) -> Tensor")
library.define(
    f"ms_deform_attn_backward(Tensor grad, {_INPUTS}, bool need_reference) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _output(
    value: Tensor, shapes: Any, points: Tensor, weights: Tensor, reference: Tensor | None
) -> Tensor:
    return value.new_empty(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])


def _gradients(
    grad: Tensor,
    value: Tensor,
    shapes: Any,
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    need_reference: bool,
) -> tuple[Tensor, ...]:
    exact = arithmetic_dtype(value.dtype)
    sizes = [points.shape, weights.shape]
    sizes.append(reference.shape if reference is not None and need_reference else torch.Size([0]))
    return value.new_empty(value.shape), *(points.new_empty(s, dtype=exact) for s in sizes)


def _twice(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "ms_deform_attn can be differentiated once only. For second derivatives use "
        "ops.reference.ms_deform_attn, with PyTorch functions that have them."
    )


def _lowered(
    value: Tensor, shapes: list[int], points: Tensor, weights: Tensor, reference: Tensor | None
) -> Tensor:
    """Autocast: the value in low precision, everything else in float32."""
    with torch.autocast(value.device.type, enabled=False):
        if value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(value.device.type))
            points, weights = points.float(), weights.float()
            reference = None if reference is None else reference.float()
        output: Tensor = torch.ops.msdeform.ms_deform_attn(
            value, shapes, points, weights, reference
        )
        return output


torch.library.register_fake("msdeform::ms_deform_attn", _output, lib=library)
torch.library.register_fake("msdeform::ms_deform_attn_backward", _gradients, lib=library)
torch.library.register_autograd("msdeform::ms_deform_attn_backward", _twice, lib=library)
for _key in ("AutocastCPU", "AutocastCUDA"):
    library.impl("ms_deform_attn", _lowered, _key)
