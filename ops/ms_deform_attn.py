"""The public op, plain and fused: checks its inputs, then calls the registered operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, schema  # noqa: F401  (schema registers the operators)

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute multi-scale deformable attention (Deformable DETR, Eq. 3, after the projections).

    Every query reads K points of each of L feature levels by bilinear interpolation and sums them
    by its attention weights. Points outside a level, and points that are NaN, read zero.

    Shape: value [N,S,M,D] with S = sum of H*W over levels; spatial_shapes L pairs (H, W), Python
        ints (a tensor [L,2] is accepted and read back to the host); sampling_locations
        [N,Q,M,L,K,2]; attention_weights [N,Q,M,L,K]; returns [N,Q,M*D] in the dtype of value.
    Units: locations are (x, y) fractions of the padded level, 0..1 from edge to edge.

    Half-precision values are summed in float32; locations and weights are used in float32, or in
    float64 if the value is float64.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    shapes = _as_ints(spatial_shapes)
    expected = _check_value(value, shapes, attention_weights)
    _check("attention_weights", attention_weights, expected)
    _check("sampling_locations", sampling_locations, (*expected, 2))
    if torch.onnx.is_in_onnx_export():
        return reference.ms_deform_attn(value, shapes, sampling_locations, attention_weights)
    output: Tensor = torch.ops.msdeform.ms_deform_attn(
        value, _flat(shapes), sampling_locations, attention_weights
    )
    return output


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute `ms_deform_attn` from the outputs of the projections, in one kernel.

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
    shapes = _as_ints(spatial_shapes)
    expected = _check_value(value, shapes, attention_logits)
    _check("attention_logits", attention_logits, expected)
    _check("sampling_offsets", sampling_offsets, (*expected, 2))
    numbers = 4 if reference_points.shape[-1:] == (4,) else 2
    _check("reference_points", reference_points, (*expected[:2], len(shapes), numbers))
    if torch.onnx.is_in_onnx_export():
        weights = attention_logits.flatten(3).softmax(-1).view_as(attention_logits)
        locations = reference.sampling_locations(reference_points, sampling_offsets, shapes)
        return reference.ms_deform_attn(value, shapes, locations, weights)
    output: Tensor = torch.ops.msdeform.fused_ms_deform_attn(
        value, _flat(shapes), reference_points, sampling_offsets, attention_logits
    )
    return output


def _as_ints(shapes: SpatialShapes) -> Sequence[tuple[int, int]]:
    if isinstance(shapes, Tensor):
        return [(int(height), int(width)) for height, width in shapes.tolist()]
    return shapes


def _flat(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [side for shape in shapes for side in shape]


def _check_value(
    value: Tensor, shapes: Sequence[tuple[int, int]], weights: Tensor
) -> tuple[int, ...]:
    """Return the shape [N,Q,M,L,K] that the other tensors must have."""
    if value.dim() != 4 or weights.dim() != 5:
        raise ValueError(
            f"ms_deform_attn: value {tuple(value.shape)} and attention {tuple(weights.shape)} must "
            "have the shapes [N,S,M,D] and [N,Q,M,L,K]."
        )
    tokens = sum(height * width for height, width in shapes)
    if value.shape[1] != tokens:
        raise ValueError(
            f"ms_deform_attn: value has {value.shape[1]} tokens, but spatial_shapes has {tokens}."
        )
    return value.shape[0], weights.shape[1], value.shape[2], len(shapes), weights.shape[4]


def _check(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"ms_deform_attn: {name} is {tuple(tensor.shape)}, must be {expected}.")
