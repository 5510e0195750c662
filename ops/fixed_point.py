"""Sums of gradients in whole numbers, which come out the same in whatever order they are added."""

import torch
from torch import Tensor

from .call import Call

_BITS = 62  # of a sum: 63 without its sign, one to spare for rounding


def fixed_point_scale(call: Call, grad: Tensor) -> Tensor:
    """Return the factor that takes gradients of the value to whole numbers of 64 bits.

    A power of two, so large that the largest possible sum just fits: what is lost lies below
    float32 for all but gradients 2**20 below the largest. NaN where a gradient or weight is no
    finite number. Shape: grad [N,Q,M*D]; returns [], float64, on the device of grad.
    """
    largest = grad.abs().amax().double()
    if call.reference is None:
        largest = largest * call.weights.abs().amax().double()
    else:  # attention is at most 1; none is a number where a head's largest logit is not finite
        largest = largest + 0 * call.weights.flatten(3).amax(-1).sum().double()
    reads = call.weights.numel() // (call.value.shape[0] * call.value.shape[2])  # of one cell
    bits = _BITS - torch.log2(largest.clamp(min=1e-300) * reads).ceil()
    return torch.where(largest.isfinite(), torch.exp2(bits.clamp(max=1000)), torch.nan)
