"""The deformable decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.groups import Groups, groups_in_layer
from models.heads import DetectionHeads, apply_delta
from models.layers import Dropout, ExactLayerNorm, checkpointed
from models.levels import FeatureLevels
from models.queries import QueryGroup
from ops import MSDeformAttn

# N batch, Q queries, S tokens, L levels, C width.


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder finds, one entry per layer, with all groups' queries side by side.

    Shape: hidden [N,Q,C], what heads read; references [N,Q,2 or 4], the points or boxes that box
    deltas add to; logits [N,Q,classes]; boxes [N,Q,4], normalised cxcywh. `aside` has an entry per
    layer if a group's route has a module of this name: the features [N,Q',C] that it returned.
    class_tokens [N,T,C]: those of the encoder, if it has some.
    """

    hidden: list[Tensor]
    references: list[Tensor]
    logits: list[Tensor]
    boxes: list[Tensor]
    aside: list[Tensor]
    class_tokens: Tensor | None = None


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
        cross_attn: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.cross_attn = cross_attn or MSDeformAttn(d_model, n_levels, n_heads, n_points)
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
        groups: Groups | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the queries, and what `groups` read aside, if any does.

        With `groups`, not all queries attend to each other, or some have parts of their own.

        Shape: x, query_pos [N,Q,C]; reference_points [N,Q,L,2 or 4]; memory [N,S,C].
        """
        if not self.cross_first:
            x = self._among_queries(x, query_pos, groups)
        x = self.before_look(x, query_pos, levels)
        attended = self.look(x + query_pos, reference_points, memory, levels)
        x = self.norm1(x + self.dropout(attended.to(x.dtype)))
        aside = None if groups is None else groups.aside(x)
        if self.cross_first:
            x = self._among_queries(x, query_pos, groups)
        fed = self._feed_forward(x) if groups is None else groups.fed(self._feed_forward, x)
        return self.norm3(x + self.dropout(fed.to(x.dtype))), aside

    def before_look(self, x: Tensor, query_pos: Tensor, levels: FeatureLevels) -> Tensor:
        """Return the queries as they look at the image. Shape: x, query_pos [N,Q,C]."""
        return x

    def look(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, levels: FeatureLevels
    ) -> Tensor:
        """Return what queries find in the memory. Shape: query [N,Q,C] -> the same."""
        attended: Tensor = self.cross_attn(
            query,
            reference_points,
            memory,
            levels.spatial_shapes,
            input_padding_mask=levels.padding_mask,
        )
        return attended

    def _among_queries(self, x: Tensor, query_pos: Tensor, groups: Groups | None) -> Tensor:
        """Let queries learn of others that find the same object."""
        query = x + query_pos
        if groups is not None:
            attended = groups.attend(self.self_attn, query, x)
            return groups.normed(self.norm2, x + self.dropout(attended.to(x.dtype)))
        attended = self.self_attn(query, query, x, need_weights=False)[0]
        output: Tensor = self.norm2(x + self.dropout(attended.to(x.dtype)))
        return output

    def _feed_forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return output


class DeformableDecoder(nn.Module):
    """The paper's decoder: with `with_box_refine`, each layer refines the boxes of the last.

    Refining and two-stage decoders hold the heads too, as official checkpoints repeat them there.
    `parts` are modules of a subclass by name; weights of a checkpoint are in this order.
    `refine_eps`: see `apply_delta`. `models/dino_decoder.py` has what later papers add.
    """

    checkpointing = False
    positions_from_boxes = False  # computed in each layer, in place of those of the groups

    def __init__(
        self,
        layers: list[DeformableDecoderLayer],
        heads: DetectionHeads,
        *,
        with_box_refine: bool,
        two_stage: bool,
        refine_eps: float = 1e-5,
        parts: Mapping[str, nn.Module | None] | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads = heads
        self.with_box_refine = with_box_refine
        self.refine_eps = refine_eps
        for name, part in (parts or {}).items():
            self.register_module(name, part)
        if with_box_refine:
            self.bbox_embed = heads.bbox_embed
        if two_stage:
            self.class_embed = heads.class_embed

    def forward(
        self, groups: Sequence[QueryGroup], memory: Tensor, levels: FeatureLevels
    ) -> DecoderOutput:
        """Decode all groups of queries at once. Shape: memory [N,S,C]."""
        x, query_pos, reference = side_by_side(groups)
        hidden, references, boxes, asides = [], [], [], []
        for index, layer in enumerate(self.layers):
            points, within = on_levels(reference, levels), within_layer(groups, index)
            x, aside = checkpointed(
                layer, x, query_pos, points, memory, levels, within, enabled=self.checkpointing
            )
            hidden.append(x)
            references.append(reference)
            asides.append(aside)
            if self.with_box_refine:
                boxes.append(apply_delta(self.heads.delta(index, x), reference, self.refine_eps))
                # a layer learns to refine the boxes it is given, not to have better ones given
                # to it: without this, training is unstable (Appendix A.4)
                reference = boxes[-1].detach()
        return self.predictions(hidden, references, boxes, asides, levels.class_tokens)

    def predictions(
        self,
        hidden: list[Tensor],
        references: list[Tensor],
        boxes: list[Tensor],
        asides: list[Tensor | None],
        class_tokens: Tensor | None,
    ) -> DecoderOutput:
        """Return what the heads read of each layer; `boxes` are there if layers refine them."""
        if not self.with_box_refine:  # every layer predicts from the first reference points
            boxes = [
                apply_delta(self.heads.delta(i, h), reference)
                for i, (h, reference) in enumerate(zip(hidden, references, strict=True))
            ]
        logits = [self.heads.logits(i, h, class_tokens) for i, h in enumerate(hidden)]
        read = [aside for aside in asides if aside is not None]
        return DecoderOutput(hidden, references, logits, boxes, read, class_tokens)


def side_by_side(groups: Sequence[QueryGroup]) -> tuple[Tensor, Tensor, Tensor]:
    """Return contents, positions [N,Q,C] and references [N,Q,2 or 4] of all groups' queries."""
    return (
        torch.cat([g.content for g in groups], dim=1),
        torch.cat([g.position for g in groups], dim=1),
        torch.cat([g.reference for g in groups], dim=1),
    )


def on_levels(reference: Tensor, levels: FeatureLevels) -> Tensor:
    """Turn fractions of the image into those of each padded level.

    Shape: [N,Q,2 or 4] -> [N,Q,L,2 or 4].
    """
    ratios = levels.valid_ratios[:, None]  # [N,1,L,2]
    scale = ratios if reference.shape[-1] == 2 else torch.cat([ratios, ratios], dim=-1)
    return reference[:, :, None] * scale


def within_layer(
    groups: Sequence[QueryGroup], index: int, relations: Sequence[Tensor | None] | None = None
) -> Groups | None:
    """Return how groups pass a layer; None for one that attends to itself and shares all parts."""
    first = groups[0]
    alone = len(groups) == 1 and first.parts == 1 and first.blocked is None and not first.routes
    return None if alone and relations is None else groups_in_layer(groups, index, relations)
