"""The op in its fused form, which checks its inputs; kernel and gradient of both forms."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .call import Call, Gradients
from .schema import library

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute `ops.ms_deform_attn` from the outputs of the projections, in one kernel.

    Softmax over the L*K samples of a head gives the attention weights; sampling offsets around
    reference points give the locations (Deformable DETR, Eq. 3 and Appendix A.4). The kernel saves
    the time and memory of computing both beforehand.

    Shape: value [N,S,M,D]; spatial_shapes L pairs (H, W); reference_points [N,Q,L,2] as (x, y) or
        [N,Q,L,4] as (cx, cy, w, h); sampling_offsets [N,Q,M,L,K,2]; attention_logits
        [N,Q,M,L,K]; returns [N,Q,M*D] in the dtype of value.
    Units: reference points and boxes are fractions of the padded level; offsets are in cells of the
        level around points, and in half widths and heights over K around boxes.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    return attend(value, spatial_shapes, sampling_offsets, attention_logits, reference_points)


def attend(
    value: Tensor,
    shapes: SpatialShapes,
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
) -> Tensor:
    """Check the inputs of either form, and compute it; without `reference`, the plain one."""
    if isinstance(shapes, Tensor):
        shapes = [(int(height), int(width)) for height, width in shapes.tolist()]
    _check(value, shapes, points, weights, reference)
    if torch.onnx.is_in_onnx_export():
        return backends.REFERENCE.forward(Call(value, tuple(shapes), points, weights, reference))
    sides = [side for shape in shapes for side in shape]
    output: Tensor = torch.ops.msdeform.ms_deform_attn(value, sides, points, weights, reference)
    return output


def _check(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
) -> None:
    if value.dim() != 4 or weights.dim() != 5:
        raise ValueError(
            f"ms_deform_attn: value {tuple(value.shape)} and attention {tuple(weights.shape)} must "
            "have the shapes [N,S,M,D] and [N,Q,M,L,K]."
        )
    (n, s, m, _), (_, q, _, _, k) = value.shape, weights.shape
    tokens = 0
    for height, width in shapes:
        if height < 0 or width < 0:
            raise ValueError(f"ms_deform_attn: spatial_shapes {list(shapes)} has a negative side.")
        tokens += height * width
    if s != tokens:
        raise ValueError(f"ms_deform_attn: value has {s} tokens, but spatial_shapes has {tokens}.")
    samples = (n, q, m, len(shapes), k)
    fused = reference is not None
    _check_shape("attention_logits" if fused else "attention_weights", weights, samples)
    _check_shape("sampling_offsets" if fused else "sampling_locations", points, (*samples, 2))
    if reference is not None:
        numbers = 4 if reference.shape[-1:] == (4,) else 2
        _check_shape("reference_points", reference, (n, q, len(shapes), numbers))


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"ms_deform_attn: {name} is {tuple(tensor.shape)}, must be {expected}.")


# One kernel for every device type, which leaves the work to the backend chosen for the device.


def _backend(device: torch.device) -> backends.Backend:
    return backends.chosen(backends.forced or os.environ.get(backends.VARIABLE), device)


@torch.library.impl(library, "ms_deform_attn", "CompositeExplicitAutograd")
def _forward(
    value: Tensor, shapes: list[int], points: Tensor, weights: Tensor, reference: Tensor | None
) -> Tensor:
    call = Call.of(value, shapes, points, weights, reference)
    if call.empty:
        return value.new_zeros(call.output_shape)
    return _backend(value.device).forward(call)


@torch.library.impl(library, "ms_deform_attn_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    need_reference: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients; empty for a reference that needs none."""
    call = Call.of(value, shapes, points, weights, reference)
    if call.empty:
        value, points, weights = (
            torch.zeros_like(t) for t in (call.value, call.points, call.weights)
        )
        of_reference = None if call.reference is None else torch.zeros_like(call.reference)
        found = Gradients(value, points, of_reference, weights)
    else:
        grad = grad.to(value.dtype).contiguous()
        found = _backend(value.device).backward(call, grad, need_reference=need_reference)
    of_reference = found.reference if need_reference else None
    if of_reference is None:
        of_reference = call.points.new_empty(0)
    return found.value, found.points, found.weights, of_reference


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, points, weights, reference = ctx.saved_tensors
    need_reference = ctx.needs_input_grad[4]
    of_value, of_points, of_weights, of_reference = torch.ops.msdeform.ms_deform_attn_backward(
        grad, value, ctx.shapes, points, weights, reference, need_reference
    )
    of_reference = of_reference.to(reference.dtype) if need_reference else None
    return of_value, None, of_points.to(points.dtype), of_weights.to(weights.dtype), of_reference


torch.library.register_autograd(
    "msdeform::ms_deform_attn", _differentiate, setup_context=_save, lib=library
)
