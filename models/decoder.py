"""The deformable decoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Dropout, ExactLayerNorm, inverse_sigmoid
from models.levels import FeatureLevels
from models.recompute import checkpointed
from ops import MSDeformAttn

# N batch, Q queries, S tokens, L levels, C width.


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder leaves for the heads, one entry per layer.

    Shape: hidden [N,Q,C]; references [N,Q,2 or 4], the points or boxes that box deltas add to;
    deltas [N,Q,4], present when the decoder refined boxes.
    """

    hidden: list[Tensor]
    references: list[Tensor]
    deltas: list[Tensor]


def apply_delta(delta: Tensor, reference: Tensor) -> Tensor:
    """Add a predicted delta to a reference point or box in logit space (Sec. 4.1 and 4.2).

    Shape: delta [N,Q,4]; reference [N,Q,2 or 4], fractions; returns cxcywh boxes [N,Q,4].
    """
    offset = inverse_sigmoid(reference)
    if offset.shape[-1] == 2:
        offset = F.pad(offset, (0, 2))  # a point says nothing of the size
    return (delta + offset).sigmoid()


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention to memory, feed-forward."""

    def __init__(
        self,
        d_model: int,
        *,
        d_ffn: int,
        dropout: float,
        n_levels: int,
        n_heads: int,
        n_points: int,
    ) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(
            d_model, n_levels=n_levels, n_heads=n_heads, n_points=n_points
        )
        self.norm1 = ExactLayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm2 = ExactLayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm3 = ExactLayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        levels: FeatureLevels,
    ) -> Tensor:
        """Shape: x, query_pos [N,Q,C]; reference_points [N,Q,L,2 or 4]; memory [N,S,C]."""
        query = x + query_pos
        attended = self.self_attn(query, query, x, need_weights=False)[0]
        x = self.norm2(x + self.dropout(attended.to(x.dtype)))
        attended = self.cross_attn(
            x + query_pos,
            reference_points,
            memory,
            levels.spatial_shapes,
            input_padding_mask=levels.padding_mask,
        )
        x = self.norm1(x + self.dropout(attended.to(x.dtype)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        output: Tensor = self.norm3(x + self.dropout(self.linear2(hidden).to(x.dtype)))
        return output


class DeformableDecoder(nn.Module):
    """A stack of decoder layers; with box heads, each layer refines the boxes of the last.

    `class_embed` is held for its state-dict keys, which official two-stage checkpoints repeat.
    """

    checkpointing = False

    def __init__(
        self,
        layers: list[DeformableDecoderLayer],
        *,
        bbox_embed: nn.ModuleList | None = None,
        class_embed: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.bbox_embed = bbox_embed
        self.class_embed = class_embed

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        reference: Tensor,
        memory: Tensor,
        levels: FeatureLevels,
    ) -> DecoderOutput:
        """Shape: queries, query_pos [N,Q,C]; reference [N,Q,2 or 4], fractions; memory [N,S,C]."""
        hidden, references, deltas = [], [], []
        ratios = levels.valid_ratios[:, None]  # [N,1,L,2]
        x = queries
        for index, layer in enumerate(self.layers):
            scale = ratios if reference.shape[-1] == 2 else torch.cat([ratios, ratios], dim=-1)
            points = reference[:, :, None] * scale
            x = checkpointed(
                layer, x, query_pos, points, memory, levels, enabled=self.checkpointing
            )
            hidden.append(x)
            references.append(reference)
            if self.bbox_embed is not None:
                delta = self.bbox_embed[index](x)
                deltas.append(delta)
                reference = apply_delta(delta, reference).detach()
        return DecoderOutput(hidden, references, deltas)
