"""Register the op with PyTorch: schemas, kernels, shapes for tracing, autograd, autocast.

`torch.ops.msdeform` has four operators: two forms and their gradients. Use `ops.ms_deform_attn` and
`ops.fused_ms_deform_attn`, which check their inputs first.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .backends import backend_for
from .call import Call, Gradients, arithmetic_dtype

_create: Any = torch.library.Library  # untyped in PyTorch
_library = _create("msdeform", "DEF")
_PLAIN, _FUSED = "ms_deform_attn", "fused_ms_deform_attn"
_library.define(
    f"{_PLAIN}(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor"
)
_library.define(
    f"{_PLAIN}_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, "
    "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"{_FUSED}(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
    "Tensor sampling_offsets, Tensor attention_logits) -> Tensor"
)
_library.define(
    f"{_FUSED}_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, "
    "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
    "bool need_reference) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(call: Call) -> Tensor:
    if call.empty:
        return call.value.new_zeros(call.output_shape)
    return backend_for(call.value.device).forward(call)


def _backward(call: Call, grad: Tensor, *, need_reference: bool = False) -> tuple[Tensor, ...]:
    """Return gradients in the order of the inputs; empty for a reference that needs none."""
    if call.empty:
        zeros = [torch.zeros_like(t) for t in (call.value, call.points, call.weights)]
        of_reference = None if call.reference is None else torch.zeros_like(call.reference)
        found = Gradients(zeros[0], zeros[1], of_reference, zeros[2])
    else:
        grad = grad.to(call.value.dtype).contiguous()
        found = backend_for(call.value.device).backward(call, grad, need_reference=need_reference)
    if call.reference is None:
        return found.value, found.points, found.weights
    of_reference = found.reference if need_reference else None
    if of_reference is None:
        of_reference = call.points.new_empty(0)
    return found.value, of_reference, found.points, found.weights


# one kernel for every device type: `backend_for` chooses the backend
@torch.library.impl(_library, _PLAIN, "CompositeExplicitAutograd")
def _plain(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return _forward(Call.of(value, shapes, locations, weights))


@torch.library.impl(_library, f"{_PLAIN}_backward", "CompositeExplicitAutograd")
def _plain_backward(
    grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    return _backward(Call.of(value, shapes, locations, weights), grad)


@torch.library.impl(_library, _FUSED, "CompositeExplicitAutograd")
def _fused(
    value: Tensor, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return _forward(Call.of(value, shapes, offsets, logits, reference))


@torch.library.impl(_library, f"{_FUSED}_backward", "CompositeExplicitAutograd")
def _fused_backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    need_reference: bool,
) -> tuple[Tensor, ...]:
    call = Call.of(value, shapes, offsets, logits, reference)
    return _backward(call, grad, need_reference=need_reference)


def _fake_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(
        f"msdeform::{name}", lib=_library
    )
    return decorate


def _fake_output(value: Tensor, points: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=arithmetic_dtype(value.dtype))


@_fake_of(_PLAIN)
def _(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    return _fake_output(value, locations)


@_fake_of(f"{_PLAIN}_backward")
def _(
    grad: Tensor, value: Tensor, shapes: Any, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), _like(locations, value), _like(weights, value)


@_fake_of(_FUSED)
def _(value: Tensor, shapes: Any, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return _fake_output(value, offsets)


@_fake_of(f"{_FUSED}_backward")
def _(
    grad: Tensor,
    value: Tensor,
    shapes: Any,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    need_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_reference = _like(reference if need_reference else value.new_empty(0), value)
    return value.new_empty(value.shape), of_reference, _like(offsets, value), _like(logits, value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, *rest = inputs
    ctx.save_for_backward(value, *rest)


def _differentiate_plain(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.msdeform.ms_deform_attn_backward(grad, value, ctx.shapes, locations, weights)
    return grads[0], None, grads[1].to(locations.dtype), grads[2].to(weights.dtype)


def _differentiate_fused(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, reference, offsets, logits = ctx.saved_tensors
    need_reference = ctx.needs_input_grad[2]
    of_value, of_reference, of_offsets, of_logits = (
        torch.ops.msdeform.fused_ms_deform_attn_backward(
            grad, value, ctx.shapes, reference, offsets, logits, need_reference
        )
    )
    return (
        of_value,
        None,
        of_reference.to(reference.dtype) if need_reference else None,
        of_offsets.to(offsets.dtype),
        of_logits.to(logits.dtype),
    )


def _twice(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "ms_deform_attn can be differentiated once only. For second derivatives use "
        "ops.reference.ms_deform_attn, with PyTorch functions that have them."
    )


def _register_autograd(name: str, backward: Any, setup: Any) -> None:
    torch.library.register_autograd(
        f"msdeform::{name}", backward, setup_context=setup, lib=_library
    )


_register_autograd(_PLAIN, _differentiate_plain, _save)
_register_autograd(_FUSED, _differentiate_fused, _save)
for _name in (_PLAIN, _FUSED):
    _register_autograd(f"{_name}_backward", _twice, lambda ctx, inputs, output: None)


def _lowered(value: Tensor, *exact: Tensor) -> list[Tensor]:
    """Autocast: the value in low precision, locations and weights in float32."""
    if value.dtype == torch.float64:
        return [value, *exact]
    dtype = torch.get_autocast_dtype(value.device.type)
    return [value.to(dtype), *(t.float() for t in exact)]


def _register_autocast(key: str, device_type: str) -> None:
    @torch.library.impl(_library, _PLAIN, key)
    def _(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            value, locations, weights = _lowered(value, locations, weights)
            output: Tensor = torch.ops.msdeform.ms_deform_attn(value, shapes, locations, weights)
            return output

    @torch.library.impl(_library, _FUSED, key)
    def _(
        value: Tensor, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            value, reference, offsets, logits = _lowered(value, reference, offsets, logits)
            output: Tensor = torch.ops.msdeform.fused_ms_deform_attn(
                value, shapes, reference, offsets, logits
            )
            return output


_register_autocast("AutocastCPU", "cpu")
_register_autocast("AutocastCUDA", "cuda")
