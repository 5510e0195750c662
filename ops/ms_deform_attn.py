"""The public op: checks its input, then runs a backend."""

from collections.abc import Sequence

from torch import Tensor

from ops import reference

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute multi-scale deformable attention (Deformable DETR, Eq. 3, after the projections).

    Every query reads K points of each of L feature levels by bilinear interpolation and sums them
    by its attention weights. Points outside a level read zero.

    Shape: value [N,S,M,D] with S = sum of H*W over levels; spatial_shapes L pairs (H, W), Python
        ints (a tensor [L,2] is accepted and read back to the host); sampling_locations
        [N,Q,M,L,K,2]; attention_weights [N,Q,M,L,K]; returns [N,Q,M*D].
    Units: locations are (x, y) fractions of the padded level, 0..1 from edge to edge.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = [(int(h), int(w)) for h, w in spatial_shapes.tolist()]
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    return reference.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


def _check_shapes(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5:
        raise ValueError(
            "ms_deform_attn: expected value [N,S,M,D], sampling_locations [N,Q,M,L,K,2] and "
            f"attention_weights [N,Q,M,L,K], got {tuple(value.shape)}, "
            f"{tuple(locations.shape)} and {tuple(weights.shape)}."
        )
    tokens = sum(h * w for h, w in shapes)
    if value.shape[1] != tokens:
        raise ValueError(
            f"ms_deform_attn: value has {value.shape[1]} tokens, spatial_shapes {tokens}."
        )
    batch, heads = value.shape[0], value.shape[2]
    expected = (batch, weights.shape[1], heads, len(shapes), weights.shape[4])
    if tuple(weights.shape) != expected or tuple(locations.shape) != (*expected, 2):
        raise ValueError(
            f"ms_deform_attn: expected attention_weights {expected} and sampling_locations "
            f"{(*expected, 2)}, got {tuple(weights.shape)} and {tuple(locations.shape)}."
        )
