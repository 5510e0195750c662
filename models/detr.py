"""DETR's decoder and queries: attention to the whole image, without points (arXiv 2005.12872).

Its encoder is `models/encoders/dense.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.decoder import DeformableDecoder, DeformableDecoderLayer
from models.encoders import Encoder
from models.levels import FeatureLevels
from models.queries import ONE_TO_ONE, Learning, QueryGroup
from models.transformer import DeformableTransformer

# N batch, Q queries, S tokens, C width.


class DenseDecoderLayer(DeformableDecoderLayer):
    """Self-attention among queries, cross-attention to all tokens, feed-forward (DETR, Fig. 10)."""

    def __init__(self, d_model: int, *, dropout: float, n_heads: int, **options: Any) -> None:
        super().__init__(
            d_model,
            dropout=dropout,
            n_heads=n_heads,
            cross_attn=nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True),
            **options,
        )

    def look(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, levels: FeatureLevels
    ) -> Tensor:
        """Compare queries with all tokens and their positions. Shape: query [N,Q,C] -> the same."""
        attended: Tensor = self.cross_attn(
            query,
            memory + levels.pos,
            memory,
            key_padding_mask=levels.padding_mask,
            need_weights=False,
        )[0]
        return attended


class DetrTransformer(DeformableTransformer):
    """A transformer whose queries do not know where to look: only their positions are learned.

    Boxes are predicted from the image's centre, which adds nothing to what heads say: its logit
    is 0.
    """

    queries_have_points = False

    def __init__(self, encoder: Encoder, decoder: DeformableDecoder, **options: Any) -> None:
        super().__init__(encoder, decoder, **options)
        self.learned_width = self.d_model
        if len(self.level_embed) == 1:  # there are no levels to distinguish
            self.level_embed.requires_grad_(False)

    def from_embedding(
        self, name: str, embedding: Tensor, batch_size: int, learning: Learning = ONE_TO_ONE
    ) -> QueryGroup:
        """Return learned queries without content, the same for every image.

        Shape: embedding [Q,C].
        """
        position = embedding[None].expand(batch_size, -1, -1)
        centre = torch.full_like(position[..., :2], 0.5)
        return QueryGroup(name, torch.zeros_like(position), position, centre, learning=learning)
