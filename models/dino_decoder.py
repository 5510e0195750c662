"""The decoder of later papers: positions from boxes, normed heads, boxes that see each other."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from models.decoder import (
    DecoderOutput,
    DeformableDecoder,
    DeformableDecoderLayer,
    on_levels,
    side_by_side,
    within_layer,
)
from models.heads import MLP, DetectionHeads, apply_delta
from models.layers import ExactLayerNorm, checkpointed, sine_embedding
from models.levels import FeatureLevels
from models.queries import QueryGroup
from models.relations import BoxBias

# N batch, Q queries, S tokens, C width.


class DinoDecoder(DeformableDecoder):
    """What DINO and Relation-DETR add to the decoder, each by itself or with the others.

    With `look_forward_twice`, a layer's losses teach the layer before as well (DINO, arXiv
    2203.03605, Sec. 3.5).
    Unless `query_position` is "fixed", each layer computes the positions of queries from the boxes
    that it is given; with "scaled_box", each layer but the first multiplies them by what it
    computes from the queries. With `norm`, heads read normalised queries; what a layer passes on,
    queries and boxes, comes from those that are not.
    With `relation`, queries that detect, and groups that see these, attend, from the second layer
    on, by how boxes lie to each other: those that a layer was given of the attending queries to
    those that it found. Both are as they are predicted.
    A `SymmetricRelationBias` does so in the last layer alone.
    """

    ref_point_head: MLP | None
    query_scale: MLP | None
    norm: ExactLayerNorm | None
    position_relation_embedding: BoxBias | None  # the published key

    def __init__(
        self,
        layers: list[DeformableDecoderLayer],
        heads: DetectionHeads,
        *,
        with_box_refine: bool,
        two_stage: bool,
        refine_eps: float = 1e-5,
        look_forward_twice: bool = False,
        query_position: Literal["fixed", "box", "scaled_box"] = "fixed",
        norm: bool = False,
        relation: BoxBias | None = None,
    ) -> None:
        width = layers[0].linear1.in_features
        from_boxes, scaled = query_position != "fixed", query_position == "scaled_box"
        super().__init__(
            layers,
            heads,
            with_box_refine=with_box_refine,
            two_stage=two_stage,
            refine_eps=refine_eps,
            parts={
                "ref_point_head": MLP(2 * width, width, width, 2) if from_boxes else None,
                "query_scale": MLP(width, width, width, 2) if scaled else None,
                "norm": ExactLayerNorm(width) if norm else None,
                "position_relation_embedding": relation,
            },
        )
        self.positions_from_boxes = from_boxes
        self.look_forward_twice = look_forward_twice

    def forward(
        self, groups: Sequence[QueryGroup], memory: Tensor, levels: FeatureLevels
    ) -> DecoderOutput:
        """Decode all groups of queries at once. Shape: memory [N,S,C]."""
        x, query_pos, reference = side_by_side(groups)
        moved = reference  # the same numbers; with `look_forward_twice`, a gradient passes
        relations: list[Tensor | None] | None = None  # once the first layer has moved the boxes
        hidden, references, boxes, asides = [], [], [], []
        for index, layer in enumerate(self.layers):
            points = on_levels(reference, levels)
            if self.ref_point_head is not None:
                query_pos = self.ref_point_head(embedded_boxes(points[:, :, 0], x.shape[-1]))
                if self.query_scale is not None and index > 0:
                    query_pos = query_pos * self.query_scale(x)
            within = within_layer(groups, index, relations)
            x, aside = checkpointed(
                layer, x, query_pos, points, memory, levels, within, enabled=self.checkpointing
            )
            hidden.append(x if self.norm is None else self.norm(x))
            references.append(moved)
            asides.append(aside)
            if self.with_box_refine:
                delta = self.heads.delta(index, hidden[-1])
                boxes.append(apply_delta(delta, moved, self.refine_eps))
                if self.norm is not None:
                    delta = self.heads.delta(index, x)
                refined = boxes[-1]
                if self.look_forward_twice or self.norm is not None:
                    refined = apply_delta(delta, reference, self.refine_eps)
                if self._relates(index + 1):
                    before = boxes[-2] if index else reference
                    relations = self._relations(groups, before, boxes[-1])
                reference = refined.detach()  # as in `DeformableDecoder`
                moved = refined if self.look_forward_twice else reference
        return self.predictions(hidden, references, boxes, asides, levels.class_tokens)

    def _relates(self, index: int) -> bool:
        """Return whether a layer sees how boxes lie."""
        relation, last = self.position_relation_embedding, len(self.layers) - 1
        if relation is None:
            return False
        return index == last if relation.last_layer_alone else index <= last

    def _relations(
        self, groups: Sequence[QueryGroup], before: Tensor, now: Tensor
    ) -> list[Tensor | None]:
        """Return what the relations of boxes add to the attention of each group.

        They do to that of the queries that detect, and of groups that see these.

        Shape: before [N,Q,2 or 4], now [N,Q,4], of all groups; returns [N heads,Q,R] of a group.
        """
        assert self.position_relation_embedding is not None
        if before.shape[-1] == 2:  # a point has no size: the first layer's boxes stand for it
            before = now
        sizes = [group.content.shape[1] for group in groups]
        boxes = zip(torch.split(before, sizes, 1), torch.split(now, sizes, 1), strict=True)
        detecting = now[:, : sizes[0]]
        found: list[Tensor | None] = []
        for group, (own_before, own_now) in zip(groups, boxes, strict=True):
            if group is not groups[0] and not (group.sees_detecting and own_now.shape[1]):
                found.append(None)
                continue
            if group.sees_detecting:
                own_now = torch.cat([detecting, own_now], dim=1)
            related: Tensor = self.position_relation_embedding(own_before, own_now)
            found.append(related.flatten(0, 1))
        return found


def embedded_boxes(boxes: Tensor, width: int) -> Tensor:
    """Return sines and cosines of y, x, w and h, in this order (DINO, arXiv 2203.03605).

    Shape: boxes [N,Q,4] cxcywh, fractions -> [N,Q,2*width].
    """
    x, y, w, h = (boxes * 2 * math.pi).unbind(-1)
    return sine_embedding(torch.stack([y, x, w, h], dim=-1), width // 2).flatten(-2)
