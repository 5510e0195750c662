"""The two-stage transformer, whose queries are the encoder's best proposals (Sec. 4.2)."""

import math

from torch import Tensor, nn

from models.decoder import DeformableDecoder
from models.encoders import Encoder
from models.layers import ExactLayerNorm, sine_embedding
from models.levels import FeatureLevels
from models.proposals import MAX_LOGIT, Proposals, token_proposals
from models.queries import ONE_TO_ONE, GroupOutput, Learning, QueryGroup
from models.transformer import DeformableTransformer

# N batch, S tokens, Q queries, C width.


class TwoStageTransformer(DeformableTransformer):
    """A transformer that looks for objects at every token first.

    With `mixed_query_selection`, the contents of queries are learned, `query_embed` [Q,C], and
    only positions are proposals. With `class_proposals`, proposals have classes; see `Proposals`.
    """

    two_stage = True
    queries_have_points = False

    def __init__(
        self,
        encoder: Encoder,
        decoder: DeformableDecoder,
        *,
        d_model: int,
        num_feature_levels: int,
        num_queries: int = 300,
        mixed_query_selection: bool = False,
        class_proposals: bool = False,
    ) -> None:
        super().__init__(
            encoder,
            decoder,
            d_model=d_model,
            num_feature_levels=num_feature_levels,
            num_queries=num_queries,
        )
        self.learned_width = d_model * mixed_query_selection  # the content, or nothing
        self.class_proposals = class_proposals
        self.enc_output = nn.Linear(d_model, d_model)
        self.enc_output_norm = ExactLayerNorm(d_model)
        if not decoder.positions_from_boxes:
            self.pos_trans = nn.Linear(d_model * 2, d_model * 2)
            self.pos_trans_norm = ExactLayerNorm(d_model * 2)

    def detecting(
        self, memory: Tensor, levels: FeatureLevels, query_embed: Tensor | None
    ) -> tuple[QueryGroup, Proposals | None]:
        """Return the queries that detect, and the proposals of which they are the best."""
        proposals = self.propose(memory, levels)
        boxes = proposals.best(0, self.num_queries)
        encoder = proposals.output()
        return self.from_boxes("", boxes, query_embed, ONE_TO_ONE, encoder), proposals

    def from_boxes(
        self,
        name: str,
        boxes: Tensor,
        contents: Tensor | None = None,
        learning: Learning = ONE_TO_ONE,
        encoder: GroupOutput | None = None,
    ) -> QueryGroup:
        """Return queries of a two-stage model that start from boxes (Sec. 4.2).

        Without `contents`, these too are made of the boxes. With learned ones, the same for every
        image, a query knows where to look but not what to find (mixed query selection, DINO,
        arXiv 2203.03605, Sec. 3.4). Shape: boxes [N,Q,4] cxcywh; contents [at least Q,C].
        """
        position = boxes.new_zeros(()).expand(*boxes.shape[:2], self.d_model)
        content = position
        if not self.decoder.positions_from_boxes:  # else each layer computes positions
            embedded = sine_embedding(boxes * 2 * math.pi, self.d_model // 2).flatten(-2)
            position, content = self.pos_trans_norm(self.pos_trans(embedded)).chunk(2, dim=-1)
        if contents is not None:  # an image may have fewer tokens than there are queries
            content = contents[None, : boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        return QueryGroup(name, content, position, boxes, learning, encoder=encoder)

    def propose(self, memory: Tensor, levels: FeatureLevels) -> Proposals:
        """Predict a box and a score at every token, by the decoder's last heads (Sec. 4.2)."""
        heads, last = self.decoder.heads, len(self.decoder.layers)
        anchors = token_proposals(levels)
        usable = anchors.isfinite().all(-1, keepdim=True)
        memory = memory.masked_fill(~usable, 0.0)
        output = self.enc_output_norm(self.enc_output(memory))
        logits = heads.logits(last, output, levels.class_tokens)
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
