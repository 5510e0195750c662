"""The op in its plain form, which takes places and weights as they are."""

from torch import Tensor

from .ms_deform_attn import SpatialShapes, attend


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
    return attend(value, spatial_shapes, sampling_locations, attention_weights, None)
