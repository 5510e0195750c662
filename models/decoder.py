"""The deformable decoder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import MLP, DetectionHeads, apply_delta
from models.layers import Dropout, ExactLayerNorm, checkpointed, sine_embedding
from models.levels import FeatureLevels
from models.queries import QueryGroup, Route
from models.relations import RelationBias
from ops import MSDeformAttn

# N batch, Q queries, S tokens, L levels, C width.


class Members(NamedTuple):
    """A group of queries in one layer: how many, who sees whom, and what it has for itself.

    `mask` has columns for all that the group attends to: [Q,R], True where a query must not attend
    to another, or [N heads,Q,R], which is added to the logits. See `QueryGroup`.
    """

    size: int
    mask: Tensor | None
    sees_detecting: bool
    parts: int
    route: Route


Groups = Sequence[Members]


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder finds, one entry per layer, with all groups' queries side by side.

    Shape: hidden [N,Q,C], what heads read; references [N,Q,2 or 4], the points or boxes that box
    deltas add to; logits [N,Q,classes]; boxes [N,Q,4], normalised cxcywh. `aside` has an entry per
    layer if a group's route has a module of this name: the features [N,Q',C] that it returned.
    """

    hidden: list[Tensor]
    references: list[Tensor]
    logits: list[Tensor]
    boxes: list[Tensor]
    aside: list[Tensor]


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
    ) -> tuple[Tensor, Tensor | None]:
        """Return the queries, and what their routes read aside, if any does.

        Shape: x, query_pos [N,Q,C]; reference_points [N,Q,L,2 or 4]; memory [N,S,C].
        """
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
        aside = _aside(x, groups)
        if self.cross_first:
            x = self._among_queries(x, query_pos, groups)
        own = [members.route.feed_forward for members in groups]
        fed = _by_group(x, groups, self._feed_forward, own)
        return self.norm3(x + self.dropout(fed.to(x.dtype))), aside

    def _feed_forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return output

    def _among_queries(self, x: Tensor, query_pos: Tensor, groups: Groups) -> Tensor:
        attended = self._attend_within(groups, x + query_pos, x)
        own = [members.route.norm for members in groups]
        return _by_group(x + self.dropout(attended.to(x.dtype)), groups, self.norm2, own)

    def _attend_within(self, groups: Groups, query: Tensor, value: Tensor) -> Tensor:
        """Attend within each group: a query learns of others that find the same object."""
        sizes = [members.size for members in groups]
        queries, values = torch.split(query, sizes, 1), torch.split(value, sizes, 1)
        attended = [
            self._attend(q, v, (queries[0], values[0]), members)
            for members, q, v in zip(groups, queries, values, strict=True)
            if members.size
        ]
        return torch.cat(attended, dim=1)

    def _attend(
        self, query: Tensor, value: Tensor, detecting: tuple[Tensor, Tensor], members: Members
    ) -> Tensor:
        shape = query.shape
        if members.parts > 1:  # each part is as if it were an image of its own
            query, value = (
                t.reshape(shape[0] * members.parts, -1, shape[2]) for t in (query, value)
            )
        key, tokens = query, members.route.tokens
        if members.sees_detecting:
            key = torch.cat([detecting[0], key], dim=1)
            value = torch.cat([detecting[1], value], dim=1)
        if tokens is not None:
            content, position = (t.to(value.dtype).expand(len(value), -1, -1) for t in tokens)
            key = torch.cat([content + position, key], dim=1)
            value = torch.cat([content, value], dim=1)
        attended: Tensor = self.self_attn(
            query, key, value, attn_mask=members.mask, need_weights=False
        )[0]
        return attended.reshape(shape)


def _by_group(
    x: Tensor,
    groups: Groups,
    shared: Callable[[Tensor], Tensor],
    own: Sequence[nn.Module | None],
) -> Tensor:
    """Apply what all groups share, or each group's own. Shape: x [N,Q,C] -> the same."""
    if all(module is None for module in own):
        return shared(x)
    parts = torch.split(x, [members.size for members in groups], dim=1)
    outputs = [
        shared(part) if module is None else module(part)
        for part, module in zip(parts, own, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def _aside(x: Tensor, groups: Groups) -> Tensor | None:
    parts = torch.split(x, [members.size for members in groups], dim=1)
    read = [
        members.route.aside(part)
        for members, part in zip(groups, parts, strict=True)
        if members.route.aside is not None
    ]
    return torch.cat(read, dim=1) if read else None


class DeformableDecoder(nn.Module):
    """A stack of decoder layers; with `with_box_refine`, each refines the boxes of the last.

    With `look_forward_twice`, a layer's losses teach the layer before as well (DINO, arXiv
    2203.03605, Sec. 3.5). Refining and two-stage decoders hold the heads too, as official
    checkpoints repeat them there.

    Unless `query_position` is "fixed", each layer computes the positions of queries from the boxes
    that it is given; with "scaled_box", each layer but the first multiplies them by what it
    computes from the queries. With `norm`, heads read normalised queries; what a layer passes on,
    queries and boxes, comes from those that are not. `refine_eps`: see `apply_delta`.
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
        query_position: Literal["fixed", "box", "scaled_box"] = "fixed",
        norm: bool = False,
        refine_eps: float = 1e-5,
        relation: RelationBias | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads = heads
        self.with_box_refine = with_box_refine
        self.look_forward_twice = look_forward_twice
        self.refine_eps = refine_eps
        width = layers[0].linear1.in_features
        from_boxes, scaled = query_position != "fixed", query_position == "scaled_box"
        self.ref_point_head = MLP(2 * width, width, width, 2) if from_boxes else None
        self.query_scale = MLP(width, width, width, 2) if scaled else None
        self.norm = ExactLayerNorm(width) if norm else None
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
        relations: Tensor | None = None  # known once the first layer has moved the boxes
        hidden, references, boxes, asides = [], [], [], []
        ratios = levels.valid_ratios[:, None]  # [N,1,L,2]
        for index, layer in enumerate(self.layers):
            # fractions of the image become fractions of each padded level
            scale = ratios if reference.shape[-1] == 2 else torch.cat([ratios, ratios], dim=-1)
            points = reference[:, :, None] * scale
            if self.ref_point_head is not None:
                query_pos = self.ref_point_head(embedded_boxes(points[:, :, 0], x.shape[-1]))
                if self.query_scale is not None and index > 0:
                    query_pos = query_pos * self.query_scale(x)
            within = [_members(group, groups[0], index, relations) for group in groups]
            x, aside = checkpointed(
                layer, x, query_pos, points, memory, levels, within, enabled=self.checkpointing
            )
            hidden.append(x if self.norm is None else self.norm(x))
            references.append(moved)
            if aside is not None:
                asides.append(aside)
            if self.with_box_refine:
                delta = self.heads.delta(index, hidden[-1])
                boxes.append(apply_delta(delta, moved, self.refine_eps))
                if self.norm is not None:
                    delta = self.heads.delta(index, x)
                # a layer learns to refine the boxes it is given, not to have better ones given
                # to it: without this, training is unstable (Appendix A.4)
                twice, refined = self.look_forward_twice, boxes[-1]
                if twice or self.norm is not None:
                    refined = apply_delta(delta, reference, self.refine_eps)
                if index + 1 < len(self.layers):
                    before = boxes[-2] if index else reference
                    relations = self._relations(groups[0], before, boxes[-1])
                reference = refined.detach()
                moved = refined if twice else reference
        if not self.with_box_refine:  # every layer predicts from the first reference points
            boxes = [apply_delta(self.heads.delta(i, h), reference) for i, h in enumerate(hidden)]
        logits = [self.heads.logits(i, h) for i, h in enumerate(hidden)]
        return DecoderOutput(hidden, references, logits, boxes, asides)

    def _relations(self, group: QueryGroup, before: Tensor, now: Tensor) -> Tensor | None:
        """Return what the relations of boxes add to the attention of the queries that detect.

        Shape: before, now [N,Q,2 or 4]; returns [N heads,Q,Q].
        """
        if self.position_relation_embedding is None:
            return None
        size = group.content.shape[1]
        if before.shape[-1] == 2:  # a point has no size: the first layer's boxes stand for it
            before = now
        related: Tensor = self.position_relation_embedding(before[:, :size], now[:, :size])
        bias = related.flatten(0, 1)
        return bias if group.blocked is None else bias.masked_fill(group.blocked, -math.inf)


def _members(
    group: QueryGroup, detecting: QueryGroup, layer: int, relations: Tensor | None
) -> Members:
    route = group.routes[layer] if group.routes else Route()
    mask = group.blocked
    if mask is not None and group.sees_detecting:
        open_columns = mask.new_zeros(len(mask), detecting.content.shape[1])
        mask = torch.cat([open_columns, mask], dim=1)
    if group is detecting and relations is not None:
        mask = relations
    size = group.content.shape[1]
    return Members(size, mask, group.sees_detecting, group.parts, route)


def embedded_boxes(boxes: Tensor, width: int) -> Tensor:
    """Return sines and cosines of y, x, w and h, in this order (DINO, arXiv 2203.03605).

    Shape: boxes [N,Q,4] cxcywh, fractions -> [N,Q,2*width].
    """
    x, y, w, h = (boxes * 2 * math.pi).unbind(-1)
    return sine_embedding(torch.stack([y, x, w, h], dim=-1), width // 2).flatten(-2)
