"""The module of multi-scale deformable attention, and dropout with cheap masks on the CPU."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ms_deform_attn import fused_ms_deform_attn

# N batch, Q queries, S tokens, M heads, L levels, K points, C width.


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (Deformable DETR, Sec. 4.1).

    Parameters and arguments have the official names and order: weights load in both directions, and
    the module replaces the official one.
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(
                f"MSDeformAttn: d_model {d_model} is not a multiple of n_heads {n_heads}."
            )
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, samples * 2)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from uniform attention on points along one direction per head (Appendix A.4)."""
        angles = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)  # [M,2]
        direction /= direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1)[:, None]
        offsets = (direction[:, None, None] * steps).expand(-1, self.n_levels, -1, -1)  # in cells
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to K points per level around its reference.

        Shape: query [N,Q,C]; reference_points [N,Q,L,2] as (x, y) or [N,Q,L,4] as (cx, cy, w, h),
            fractions of the padded levels; input_flatten [N,S,C]; input_spatial_shapes L pairs
            (H, W), as ints, since reading a tensor waits for the GPU; input_level_start_index
            follows from them and is not read; input_padding_mask [N,S], True = padding; returns
            [N,Q,C].
        """
        n, q, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.view(n, input_flatten.shape[1], self.n_heads, -1)
        samples = (n, q, self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        logits = self.attention_weights(query).view(samples)
        attended = fused_ms_deform_attn(
            value, input_spatial_shapes, reference_points, offsets, logits
        )
        output: Tensor = self.output_proj(attended)
        return output


def fast_cpu_dropout(x: Tensor, p: float) -> Tensor:
    """Drop elements with probability `p`, and scale the others up; four masks from one number.

    PyTorch draws one number for each element on the CPU, a seventh of a training step's time. Here
    sixteen bits decide on an element: `p` is met to 1 in 65536, and the scale is exact for what is
    met.
    """
    threshold = round(p * 2**16)
    if not 0 < threshold < 2**16:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = (bits >= threshold - 2**15).to(x.dtype)
    return x * kept.mul_(2**16 / (2**16 - threshold))
