"""The input and results of every backend: one call of the op, contiguous, in fixed dtypes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points.

# how the compiled kernels number the dtypes of a value
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class BackendError(RuntimeError):
    """A backend cannot be built or cannot run here; the message is one line with the reason."""


@dataclass(frozen=True)
class Call:
    """Inputs of the plain form or, with `reference`, of the fused form.

    Shape: value [N,S,M,D]; shapes L pairs (H, W); points [N,Q,M,L,K,2], sampling locations or
        sampling offsets; weights [N,Q,M,L,K], attention weights or attention logits; reference
        [N,Q,L,2 or 4].
    Everything but `value` is float32, or float64 where `value` is.
    """

    value: Tensor
    shapes: tuple[tuple[int, int], ...]
    points: Tensor
    weights: Tensor
    reference: Tensor | None = None

    @classmethod
    def of(
        cls,
        value: Tensor,
        flat_shapes: Sequence[int],
        points: Tensor,
        weights: Tensor,
        reference: Tensor | None = None,
    ) -> "Call":
        """Convert the raw arguments of the registered op to the form that kernels read."""
        shapes = tuple(zip(flat_shapes[::2], flat_shapes[1::2], strict=True))
        exact = arithmetic_dtype(value.dtype)
        points, weights = _dense(points, exact), _dense(weights, exact)
        reference = None if reference is None else _dense(reference, exact)
        return cls(value.contiguous(), shapes, points, weights, reference)

    @property
    def form(self) -> int:
        """How many numbers a reference has; 0 in the plain form."""
        return 0 if self.reference is None else self.reference.shape[-1]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """[N, Q, M*D]."""
        n, _, m, d = self.value.shape
        return n, self.points.shape[1], m * d

    @property
    def empty(self) -> bool:
        """No query, no head, no channel, no sample or no token: every result is zero or empty."""
        return min(self.value.numel(), self.weights.numel()) == 0

    def of_offsets_and_reference(self, of_locations: Tensor) -> tuple[Tensor, Tensor]:
        """Propagate the gradient of `sampling_locations` to offsets and reference points.

        Shape: of_locations [N,Q,M,L,K,2]; returns those of offsets and reference.
        """
        assert self.reference is not None
        offsets, of_centre = self.points, of_locations.sum((2, 4))  # [N,Q,L,2]
        if self.reference.shape[-1] == 2:
            return of_locations / level_sizes(self.shapes, offsets)[:, None], of_centre
        share = 0.5 / offsets.shape[4]
        of_offsets = of_locations * self.reference[:, :, None, :, None, 2:] * share
        # an offset that is NaN has no gradient, and gives the box none
        of_sides = (of_locations * offsets.where(of_locations != 0, 0)).sum((2, 4)) * share
        return of_offsets, torch.cat([of_centre, of_sides], dim=-1)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the tensors of a `Call`, in their shapes and dtypes."""

    value: Tensor
    points: Tensor
    reference: Tensor | None  # None if not requested
    weights: Tensor


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:  # asking takes a tenth of the time of converting nothing
        return tensor.contiguous()
    return tensor.to(dtype).contiguous()


def arithmetic_dtype(storage: torch.dtype) -> torch.dtype:
    """Return the dtype of points, weights and sums for values of dtype `storage`."""
    return torch.float64 if storage == torch.float64 else torch.float32


def level_sizes(spatial_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Return (width, height) of each level in cells. Shape: [L,2], dtype and device of `like`."""
    # filled on the device: a copy from the host would wait for all work queued there
    sides = [
        like.new_full((), side) for height, width in spatial_shapes for side in (width, height)
    ]
    return torch.stack(sides).view(-1, 2)
