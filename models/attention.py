"""The multi-scale deformable attention module."""

import math

import torch
from torch import Tensor, nn

from ops import ms_deform_attn

# N batch, Q queries, S tokens, M heads, L levels, K points, C width.


def level_sizes(spatial_shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Return (width, height) of each level in cells. Shape: [L,2], dtype and device of `like`."""
    # filled on the device: copying from the host would wait for all work under way there
    sides = [
        like.new_full((), side) for height, width in spatial_shapes for side in (width, height)
    ]
    return torch.stack(sides).view(-1, 2)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (Deformable DETR, Sec. 4.1).

    Parameter names are the official ones.
    """

    def __init__(self, d_model: int, *, n_levels: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, samples * 2)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from uniform attention on points along one direction per head (Appendix A.4)."""
        angles = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)  # [M,2]
        direction /= direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1)
        offsets = direction[:, None, None] * steps[:, None]  # [M,1,K,2], in cells
        offsets = offsets.expand(-1, self.n_levels, -1, -1)
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
        tokens: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding_mask: Tensor,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to K points per level around its reference.

        Shape: query [N,Q,C]; reference_points [N,Q,L,2] as (x, y) or [N,Q,L,4] as (cx, cy, w, h),
            fractions of the padded levels; tokens [N,S,C]; padding_mask [N,S], True = padding;
            sizes [L,2], `level_sizes` if they are at hand; returns [N,Q,C].
        """
        n, q, _ = query.shape
        value = self.value_proj(tokens).masked_fill(padding_mask[..., None], 0.0)
        value = value.view(n, tokens.shape[1], self.n_heads, -1)
        samples = (n, q, self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        weights = self.attention_weights(query).view(*samples[:3], -1).softmax(-1).view(samples)
        sizes = level_sizes(spatial_shapes, offsets) if sizes is None else sizes
        locations = self._locations(reference_points, offsets, sizes)
        output: Tensor = self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))
        return output

    def _locations(self, reference: Tensor, offsets: Tensor, sizes: Tensor) -> Tensor:
        reference = reference[:, :, None, :, None]  # [N,Q,1,L,1,2 or 4]
        if reference.shape[-1] == 2:
            return reference + offsets / sizes[:, None]
        # a box: offsets are relative to half its size, whatever the level (Appendix A.4)
        return reference[..., :2] + offsets / self.n_points * reference[..., 2:] * 0.5
