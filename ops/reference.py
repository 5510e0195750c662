"""Multi-scale deformable attention in plain PyTorch: any device, any dtype, differentiable.

It defines the results of the compiled backends, is the fallback where none of them runs, and is
the form that exports to ONNX.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, Gradients, arithmetic_dtype, level_sizes

# N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points.

Shapes = Sequence[tuple[int, int]]
_OUTSIDE = -2.0  # a location outside every level; grid sampling does not define NaN


def ms_deform_attn(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Compute Eq. 3 of Deformable DETR by bilinear grid sampling, level by level.

    See `ops.ms_deform_attn` for shapes and units. Half precision is summed in float32.
    """
    grids = _grids(sampling_locations)
    levels = [
        F.grid_sample(maps, grids[:, :, level], padding_mode="zeros", align_corners=False)
        for level, maps in enumerate(_maps(value, spatial_shapes))
    ]
    sampled = torch.cat(levels, dim=-1)  # [N*M, D, Q, L*K]
    output = (sampled * _per_head(attention_weights, sampled.dtype)).sum(-1)  # [N*M, D, Q]
    n, _, m, d = value.shape
    output = output.view(n, m * d, -1).transpose(1, 2).contiguous()
    return output.to(value.dtype)


def sampling_locations(reference: Tensor, offsets: Tensor, spatial_shapes: Shapes) -> Tensor:
    """Add sampling offsets to reference points (Deformable DETR, Eq. 3 and Appendix A.4).

    Shape: reference [N,Q,L,2] as (x, y) or [N,Q,L,4] as (cx, cy, w, h); offsets [N,Q,M,L,K,2];
        returns [N,Q,M,L,K,2].
    Units: fractions of the padded level; offsets are in cells for points, and in half boxes over K
        for boxes, whatever the level.
    """
    reference = reference[:, :, None, :, None]  # [N,Q,1,L,1,2 or 4]
    if reference.shape[-1] == 2:
        return reference + offsets / level_sizes(spatial_shapes, offsets)[:, None]
    return reference[..., :2] + offsets * reference[..., 2:] * (0.5 / offsets.shape[4])


def _maps(value: Tensor, spatial_shapes: Shapes) -> list[Tensor]:
    """Return the levels as images. Shape: L x [N*M, D, H, W]."""
    n, _, m, d = value.shape
    # grid sampling in half precision would round the locations, and fails on the CPU
    per_head = value.to(arithmetic_dtype(value.dtype)).permute(0, 2, 3, 1).flatten(0, 1)
    sizes = [height * width for height, width in spatial_shapes]
    levels = zip(torch.split(per_head, sizes, dim=-1), spatial_shapes, strict=True)
    return [tokens.reshape(n * m, d, *shape) for tokens, shape in levels]


def _grids(locations: Tensor) -> Tensor:
    """Return sampling locations as -1..1. Shape: [N*M, Q, L, K, 2]."""
    locations = locations.nan_to_num(_OUTSIDE, _OUTSIDE, _OUTSIDE)
    return (2 * locations - 1).transpose(1, 2).flatten(0, 1)


def _per_head(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape: weights [N,Q,M,L,K], returns [N*M, 1, Q, L*K]."""
    return weights.to(dtype).transpose(1, 2).flatten(0, 1).flatten(2)[:, None]


class ReferenceBackend:
    """Forward and backward in PyTorch functions; autograd does not run inside a registered op."""

    name = "reference"
    devices: tuple[str, ...] = ()

    def unavailable(self, device: torch.device) -> str | None:
        """See `Backend`. Runs wherever PyTorch does."""
        return None

    def forward(self, call: Call) -> Tensor:
        """See `Backend`."""
        return ms_deform_attn(call.value, call.shapes, *_plain(call))

    def backward(self, call: Call, grad: Tensor, *, need_reference: bool) -> Gradients:
        """See `Backend`."""
        locations, weights = _plain(call)
        value, of_locations, of_weights = _plain_backward(call, grad, locations, weights)
        if call.reference is None:
            return Gradients(value, of_locations, None, of_weights)
        mean = (of_weights * weights).flatten(3).sum(-1)[..., None, None]
        of_logits = weights * (of_weights - mean)
        of_offsets, of_reference = call.of_offsets_and_reference(of_locations)
        return Gradients(value, of_offsets, of_reference if need_reference else None, of_logits)


def _plain(call: Call) -> tuple[Tensor, Tensor]:
    """Return the sampling locations and attention weights of either form."""
    if call.reference is None:
        return call.points, call.weights
    weights = call.weights.flatten(3).softmax(-1).view_as(call.weights)
    return sampling_locations(call.reference, call.points, call.shapes), weights


def _plain_backward(
    call: Call, grad: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n, s, m, d = call.value.shape
    q, levels, k = locations.shape[1], len(call.shapes), locations.shape[4]
    grids = _grids(locations)
    grad = grad.to(locations.dtype).view(n, q, m, d).permute(0, 2, 3, 1).reshape(n * m, d, q, 1)
    shares = _per_head(weights, grad.dtype).view(n * m, 1, q, levels, k)
    of_value, of_grids, of_weights = [], [], []
    for level, maps in enumerate(_maps(call.value, call.shapes)):
        grid = grids[:, :, level]
        sampled = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
        of_weights.append((grad * sampled).sum(1))  # [N*M, Q, K]
        of_maps, of_grid = torch.ops.aten.grid_sampler_2d_backward(
            (grad * shares[:, :, :, level]), maps, grid, 0, 0, False, [True, True]
        )
        of_value.append(of_maps.flatten(2))  # [N*M, D, H*W]
        of_grids.append(of_grid)  # [N*M, Q, K, 2]
    value = torch.cat(of_value, dim=-1).view(n, m, d, s).permute(0, 3, 1, 2)
    per_query = (n, m, q, levels, k)
    return (
        value.to(call.value.dtype).contiguous(),
        (2 * torch.stack(of_grids, 2)).view(*per_query, 2).transpose(1, 2).contiguous(),
        torch.stack(of_weights, 2).view(per_query).transpose(1, 2).contiguous(),
    )
