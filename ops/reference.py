"""Multi-scale deformable attention in plain PyTorch: any device, any dtype, differentiable."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points.


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute Eq. 3 of Deformable DETR by bilinear grid sampling, level by level.

    See `ops.ms_deform_attn` for shapes and units.
    """
    n, _, m, d = value.shape
    q, levels, k = sampling_locations.shape[1], len(spatial_shapes), sampling_locations.shape[4]
    per_head = value.permute(0, 2, 3, 1).flatten(0, 1)  # [N*M, D, S]
    grids = (2 * sampling_locations - 1).transpose(1, 2)  # [N, M, Q, L, K, 2], -1..1
    sampled = []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        tokens = per_head[:, :, start : start + height * width]
        start += height * width
        grid = grids[:, :, :, level].reshape(n * m, q, k, 2).to(value.dtype)
        # contiguous: grid_sample in bfloat16 on CPU reads strided maps wrongly
        maps = tokens.contiguous().view(n * m, d, height, width)
        sampled.append(
            F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        )  # [N*M, D, Q, K]
    weights = attention_weights.transpose(1, 2).reshape(n * m, 1, q, levels * k)
    output = (torch.cat(sampled, dim=-1) * weights).sum(-1)  # [N*M, D, Q]
    return output.view(n, m * d, q).transpose(1, 2).contiguous()
