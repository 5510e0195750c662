"""The deformable decoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import DetectionHeads, apply_delta
from models.layers import Dropout, ExactLayerNorm, checkpointed
from models.levels import FeatureLevels
from models.queries import QueryGroup
from models.relations import RelationBias
from ops import MSDeformAttn

# N batch, Q queries, S tokens, L levels, C width.

# The number of queries of each group, and what its attention is masked by: [Q,Q], True where a
# query must not attend to another, or [N heads,Q,Q], which is added to the logits.
Groups = Sequence[tuple[int, Tensor | None]]


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder finds, one entry per layer, with all groups' queries side by side.

    Shape: hidden [N,Q,C]; references [N,Q,2 or 4], the points or boxes that box deltas add to;
    logits [N,Q,classes]; boxes [N,Q,4], normalised cxcywh.
    """

    hidden: list[Tensor]
    references: list[Tensor]
    logits: list[Tensor]
    boxes: list[Tensor]


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention to memory, feed-forward.

    With `cross_first`, queries look at the image before they learn of each other.
    """

    cross_first: bool = False

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
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
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
        groups: Groups,
    ) -> Tensor:
        """Shape: x, query_pos [N,Q,C]; reference_points [N,Q,L,2 or 4]; memory [N,S,C]."""
        if not self.cross_first:
            x = self._among_queries(x, query_pos, groups)
        attended = self.cross_attn(
            x + query_pos,
            reference_points,
            memory,
            levels.spatial_shapes,
            input_padding_mask=levels.padding_mask,
        )
        x = self.norm1(x + self.dropout(attended.to(x.dtype)))
        if self.cross_first:
            x = self._among_queries(x, query_pos, groups)
        hidden = self.dropout(F.relu(self.linear1(x)))
        output: Tensor = self.norm3(x + self.dropout(self.linear2(hidden).to(x.dtype)))
        return output

    def _among_queries(self, x: Tensor, query_pos: Tensor, groups: Groups) -> Tensor:
        attended = self._attend_within(groups, x + query_pos, x)
        output: Tensor = self.norm2(x + self.dropout(attended.to(x.dtype)))
        return output

    def _attend_within(self, groups: Groups, query: Tensor, value: Tensor) -> Tensor:
        """Attend within each group: a query learns of others that find the same object."""
        sizes = [size for size, _ in groups]
        parts = zip(groups, torch.split(query, sizes, 1), torch.split(value, sizes, 1), strict=True)
        attended = [
            self.self_attn(q, q, v, attn_mask=blocked, need_weights=False)[0]
            for (size, blocked), q, v in parts
            if size
        ]
        return torch.cat(attended, dim=1)


class DeformableDecoder(nn.Module):
    """A stack of decoder layers; with `with_box_refine`, each refines the boxes of the last.

    With `look_forward_twice`, a layer's losses teach the layer before as well (DINO, arXiv
    2203.03605, Sec. 3.5). Refining and two-stage decoders hold the heads too, as official
    checkpoints repeat them there.

    With `relation`, queries that detect attend, from the second layer on, by how their boxes lie to
    each other: those that a layer was given to those that it found. Both are as they are predicted.
    """

    checkpointing = False

    def __init__(
        self,
        layers: list[DeformableDecoderLayer],
        heads: DetectionHeads,
        *,
        with_box_refine: bool,
        two_stage: bool,
        look_forward_twice: bool = False,
        relation: RelationBias | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads = heads
        self.with_box_refine = with_box_refine
        self.look_forward_twice = look_forward_twice
        self.position_relation_embedding = relation  # the published key
        if with_box_refine:
            self.bbox_embed = heads.bbox_embed
        if two_stage:
            self.class_embed = heads.class_embed

    def forward(
        self, groups: Sequence[QueryGroup], memory: Tensor, levels: FeatureLevels
    ) -> DecoderOutput:
        """Decode all groups of queries at once. Shape: memory [N,S,C]."""
        x = torch.cat([g.content for g in groups], dim=1)
        query_pos = torch.cat([g.position for g in groups], dim=1)
        reference = torch.cat([g.reference for g in groups], dim=1)
        moved = reference  # the same numbers; with `look_forward_twice`, a gradient passes
        unrelated = [(g.content.shape[1], g.blocked) for g in groups]
        within: Groups = unrelated
        hidden, references, boxes = [], [], []
        ratios = levels.valid_ratios[:, None]  # [N,1,L,2]
        for index, layer in enumerate(self.layers):
            # fractions of the image become fractions of each padded level
            scale = ratios if reference.shape[-1] == 2 else torch.cat([ratios, ratios], dim=-1)
            points = reference[:, :, None] * scale
            x = checkpointed(
                layer, x, query_pos, points, memory, levels, within, enabled=self.checkpointing
            )
            hidden.append(x)
            references.append(reference)
            if self.with_box_refine:
                delta = self.heads.delta(index, x)
                boxes.append(apply_delta(delta, moved))
                # a layer learns to refine the boxes it is given, not to have better ones given
                # to it: without this, training is unstable (Appendix A.4)
                twice = self.look_forward_twice
                moved = apply_delta(delta, reference) if twice else boxes[-1].detach()
                if index + 1 < len(self.layers):
                    before = boxes[-2] if index else reference
                    within = self._related(unrelated, before, boxes[-1])
                reference = moved.detach()
        if not self.with_box_refine:  # every layer predicts from the first reference points
            boxes = [apply_delta(self.heads.delta(i, h), reference) for i, h in enumerate(hidden)]
        logits = [self.heads.logits(i, h) for i, h in enumerate(hidden)]
        return DecoderOutput(hidden, references, logits, boxes)

    def _related(self, groups: Groups, before: Tensor, now: Tensor) -> Groups:
        """Return the groups, the first of which attends by relations. Shape: [N,Q,2 or 4] each."""
        if self.position_relation_embedding is None:
            return groups
        size, blocked = groups[0]
        if before.shape[-1] == 2:  # a point has no size: the first layer's boxes stand for it
            before = now
        bias = self.position_relation_embedding(before[:, :size], now[:, :size]).flatten(0, 1)
        if blocked is not None:
            bias = bias.masked_fill(blocked, -math.inf)
        return [(size, bias), *groups[1:]]
