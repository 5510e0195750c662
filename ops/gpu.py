"""The gradients on a GPU: those of the value are added up, as many threads find parts of them."""

import torch
from torch import Tensor

from .call import Call, Gradients

_SUM_BITS = 62  # 63 without the sign, one spare for rounding


class GpuBackend:
    """The backward pass of the backends of GPUs; each starts its own kernel.

    Sums in float32 by atomic addition, in an order that varies between runs; with
    `torch.use_deterministic_algorithms(True)` in 64-bit integers (`fixed_point_scale`).
    """

    def backward(self, call: Call, grad: Tensor, *, need_reference: bool) -> Gradients:
        """See `Backend`."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        exact = call.points.dtype
        value = torch.zeros_like(call.value, dtype=torch.int64 if deterministic else exact)
        scale = fixed_point_scale(call, grad) if deterministic else None
        points, weights = torch.empty_like(call.points), torch.empty_like(call.weights)
        self.start_backward(
            call,
            scale,
            to_locations=need_reference,
            grad_output=grad,
            grad_value=value,
            grad_points=points,
            grad_weights=weights,
        )
        if scale is not None:
            value = (value.double() / scale).to(exact)  # all NaN if any gradient was
        value = value.to(call.value.dtype)
        if need_reference:
            return Gradients(value, *call.of_offsets_and_reference(points), weights)
        return Gradients(value, points, None, weights)

    def start_backward(
        self,
        call: Call,
        scale: Tensor | None,
        *,
        to_locations: bool,
        grad_output: Tensor,
        grad_value: Tensor,
        grad_points: Tensor,
        grad_weights: Tensor,
    ) -> None:
        """Start the kernel, which adds to `grad_value` and writes the other gradients.

        With `scale`, that of the value is a sum of integers, this many times as large. With
        `to_locations`, `grad_points` is of sampling locations, in the fused form too.
        """
        raise NotImplementedError


def fixed_point_scale(call: Call, grad: Tensor) -> Tensor:
    """Return the factor that scales gradients of the value to 64-bit integers.

    Sums of integers are the same in any order. The factor is the largest power of two for which
    every possible sum fits: the error is below that of float32 for all gradients but those 2**20
    below the largest. NaN if a gradient or weight is not finite.

    Shape: grad [N,Q,M*D]; returns [], float64, on the device of grad.
    """
    largest = grad.abs().amax().double()
    if call.reference is None:
        largest = largest * call.weights.abs().amax().double()
    else:  # attention is at most 1, and NaN where a head's largest logit is not finite
        largest = largest + 0 * call.weights.flatten(3).amax(-1).sum().double()
    reads = call.weights.numel() // (call.value.shape[0] * call.value.shape[2])  # of one cell
    bits = _SUM_BITS - torch.log2(largest.clamp(min=1e-300) * reads).ceil()
    return torch.where(largest.isfinite(), torch.exp2(bits.clamp(max=1000)), torch.nan)
