"""The deformable transformer: levels to memory, memory to object queries."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.decoder import DecoderOutput, DeformableDecoder
from models.encoders import Encoder
from models.layers import ExactLinear
from models.levels import FeatureLevels, join_levels
from models.proposals import Proposals
from models.queries import ONE_TO_ONE, Learning, QueryGroup

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
    """Encoder, decoder, and what makes queries of embeddings; `TwoStageTransformer`: of memory."""

    two_stage = False
    queries_have_points = True  # learned queries know where to look

    def __init__(
        self,
        encoder: Encoder,
        decoder: DeformableDecoder,
        *,
        d_model: int,
        num_feature_levels: int,
        num_queries: int = 300,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.learned_width = 2 * d_model  # of each query: its position and content
        self.num_queries = num_queries
        self.encoder = encoder
        self.decoder = decoder
        # distinguishes tokens of different levels, whose sines may be the same (Sec. 4.1)
        self.level_embed = nn.Parameter(torch.zeros(num_feature_levels, d_model))
        if self.queries_have_points:
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

        Shape: features, pos L x [N,C,H,W]; masks L x [N,H,W]; query_embed [Q,2C], for a two-stage
            model see `TwoStageTransformer`.
        """
        levels = join_levels(features, masks, pos, self.level_embed)
        memory = self.encoder(levels)
        if isinstance(memory, tuple):
            memory, class_tokens = memory
            levels = replace(levels, class_tokens=class_tokens)
        detecting, proposals = self.detecting(memory, levels, query_embed)
        groups = regroup([detecting, *more(memory, proposals)], proposals)
        return TransformerOutput(groups, self.decoder(groups, memory, levels), proposals)

    def detecting(
        self, memory: Tensor, levels: FeatureLevels, query_embed: Tensor | None
    ) -> tuple[QueryGroup, Proposals | None]:
        """Return the queries that detect, and a two-stage encoder's proposals."""
        assert query_embed is not None
        return self.from_embedding("", query_embed, memory.shape[0], ONE_TO_ONE), None

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
