"""The deformable transformer: levels to memory, memory to object queries."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.decoder import DecoderOutput, DeformableDecoder
from models.encoders import Encoder
from models.layers import ExactLayerNorm, ExactLinear, sine_embedding
from models.levels import FeatureLevels, join_levels
from models.queries import (
    MAX_LOGIT,
    ONE_TO_ONE,
    Learning,
    Proposals,
    QueryGroup,
    token_proposals,
)

# N batch, S tokens, Q queries, L levels, C width.

# Memory, and a two-stage encoder's proposals -> groups of queries beside those that detect.
MoreQueries = Callable[[Tensor, Proposals | None], list[QueryGroup]]
# All groups, and the proposals -> the groups that are decoded.
Regroup = Callable[[list[QueryGroup], Proposals | None], list[QueryGroup]]


@dataclass(frozen=True)
class TransformerOutput:
    """What was decoded for each group of queries, and a two-stage encoder's proposals."""

    groups: list[QueryGroup]
    decoder: DecoderOutput
    proposals: Proposals | None


class DeformableTransformer(nn.Module):
    """Encoder, decoder, and what turns memory or embeddings into queries."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: DeformableDecoder,
        *,
        d_model: int,
        num_feature_levels: int,
        two_stage: bool = False,
        mixed_query_selection: bool = False,
        class_proposals: bool = False,
        num_queries: int = 300,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.two_stage = two_stage
        # of what is learned for each query: position and content, the content, or nothing
        self.learned_width = 2 * d_model if not two_stage else d_model * mixed_query_selection
        self.num_queries = num_queries
        self.class_proposals = class_proposals
        self.encoder = encoder
        self.decoder = decoder
        # distinguishes tokens of different levels, whose sines may be the same (Sec. 4.1)
        self.level_embed = nn.Parameter(torch.zeros(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = ExactLayerNorm(d_model)
            if decoder.ref_point_head is None:
                self.pos_trans = nn.Linear(d_model * 2, d_model * 2)
                self.pos_trans_norm = ExactLayerNorm(d_model * 2)
        else:
            self.reference_points = ExactLinear(d_model, 2)

    def forward(
        self,
        features: list[Tensor],
        masks: list[Tensor],
        pos: list[Tensor],
        query_embed: Tensor | None,
        more: MoreQueries = lambda memory, proposals: [],
        regroup: Regroup = lambda groups, proposals: groups,
    ) -> TransformerOutput:
        """Encode, choose or make queries, decode.

        `more` adds groups of queries; `regroup` sees all of them and may change or add some.

        Shape: features, pos L x [N,C,H,W]; masks L x [N,H,W]; query_embed [Q,2C]. In a two-stage
            model it is [Q,C], the contents of queries whose positions are proposals, or None for
            contents from the proposals, too.
        """
        levels = join_levels(features, masks, pos, self.level_embed)
        memory: Tensor = self.encoder(levels)
        proposals = None
        if self.two_stage:
            proposals = self.propose(memory, levels)
            detecting = self.from_boxes("", proposals.best(0, self.num_queries), query_embed)
            detecting = replace(detecting, encoder=proposals.output())
        else:
            assert query_embed is not None
            detecting = self.from_embedding("", query_embed, len(memory))
        groups = regroup([detecting, *more(memory, proposals)], proposals)
        return TransformerOutput(groups, self.decoder(groups, memory, levels), proposals)

    def from_embedding(
        self, name: str, embedding: Tensor, batch_size: int, learning: Learning = ONE_TO_ONE
    ) -> QueryGroup:
        """Return learned queries, the same for every image (Sec. 4.1).

        A query's position says where it looks first: attention samples around that point, and
        boxes are predicted relative to it. Shape: embedding [Q,2C].
        """
        position, content = embedding.chunk(2, dim=-1)
        position = position[None].expand(batch_size, -1, -1)
        content = content[None].expand(batch_size, -1, -1)
        reference = self.reference_points(position).sigmoid()
        return QueryGroup(name, content, position, reference, learning=learning)

    def from_boxes(
        self,
        name: str,
        boxes: Tensor,
        contents: Tensor | None = None,
        learning: Learning = ONE_TO_ONE,
    ) -> QueryGroup:
        """Return queries of a two-stage model that start from boxes (Sec. 4.2).

        Without `contents`, these too are made of the boxes. With learned ones, the same for every
        image, a query knows where to look but not what to find (mixed query selection, DINO,
        arXiv 2203.03605, Sec. 3.4). Shape: boxes [N,Q,4] cxcywh; contents [at least Q,C].
        """
        position = boxes.new_zeros(()).expand(*boxes.shape[:2], self.d_model)
        content = position
        if self.decoder.ref_point_head is None:  # else each layer computes positions
            embedded = sine_embedding(boxes * 2 * math.pi, self.d_model // 2).flatten(-2)
            position, content = self.pos_trans_norm(self.pos_trans(embedded)).chunk(2, dim=-1)
        if contents is not None:  # an image may have fewer tokens than there are queries
            content = contents[None, : boxes.shape[1]].expand(len(boxes), -1, -1)
        return QueryGroup(name, content, position, boxes, learning=learning)

    def propose(self, memory: Tensor, levels: FeatureLevels) -> Proposals:
        """Predict a box and a score at every token, by the decoder's last heads (Sec. 4.2)."""
        heads, last = self.decoder.heads, len(self.decoder.layers)
        anchors = token_proposals(levels)
        usable = anchors.isfinite().all(-1, keepdim=True)
        memory = memory.masked_fill(~usable, 0.0)
        output = self.enc_output_norm(self.enc_output(memory))
        logits = heads.logits(last, output)
        # infinite anchors become finite boxes: what is not finite is looked for in outputs
        box_logits = (heads.delta(last, output) + anchors).clamp(max=MAX_LOGIT)
        return Proposals(
            logits,
            box_logits,
            anchors.sigmoid(),
            levels.padding_mask,
            memory,
            num_learning=self.num_queries if self.class_proposals else None,
        )
