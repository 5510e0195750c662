"""Deformable attention on one map (Deformable DETR, Eq. 2)."""

from torch import Tensor

from ops import MSDeformAttn


class DeformAttn(MSDeformAttn):
    """Attention from each query to K points of one map, for each of M heads.

    sum over m of W_m [ sum over k of A_mqk * W'_m x(p_q + offset_mqk) ]: offsets, in cells, and
    weights A, which sum to 1 over k, are linear in the query. It is multi-scale attention (Eq. 3)
    on one level, with the same parameters.
    """

    def __init__(self, d_model: int = 256, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__(d_model, 1, n_heads, n_points)

    def forward(  # type: ignore[override]  # it takes a map in place of levels
        self, query: Tensor, reference: Tensor, x: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """Attend from each query to points around its reference.

        Shape: query [N,Q,C]; reference [N,Q,2] as (x, y), fractions of the map; x [N,C,H,W];
            padding [N,H,W], True = padding, which reads as zero; returns [N,Q,C].
        """
        return super().forward(
            query,
            reference[:, :, None],
            x.flatten(2).mT,
            [(x.shape[2], x.shape[3])],
            None,
            None if padding is None else padding.flatten(1),
        )
