"""Grounding DINO's decoder layer: queries also look at the class tokens (arXiv 2303.05499)."""

from typing import Any

from torch import Tensor, nn

from models.decoder import DeformableDecoderLayer
from models.layers import ExactLayerNorm
from models.levels import FeatureLevels

# N batch, Q queries, T class tokens, C width.


class TokenDecoderLayer(DeformableDecoderLayer):
    """Between attention among queries and the look at the image, one at class tokens (Sec. 3.3)."""

    def __init__(self, d_model: int, *, dropout: float, n_heads: int, **options: Any) -> None:
        super().__init__(d_model, dropout=dropout, n_heads=n_heads, **options)
        self.token_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.token_norm = ExactLayerNorm(d_model)

    def before_look(self, x: Tensor, query_pos: Tensor, levels: FeatureLevels) -> Tensor:
        """Return the queries after a look at class tokens. Shape: x, query_pos [N,Q,C]."""
        tokens = levels.class_tokens
        attended = self.token_attn(x + query_pos, tokens, tokens, need_weights=False)[0]
        output: Tensor = self.token_norm(x + self.dropout(attended.to(x.dtype)))
        return output
