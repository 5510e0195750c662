"""An encoder whose layers use other attention than the paper's, alone or before it."""

from torch import Tensor, nn

from models.encoders import ENCODERS, EncoderOptions
from models.encoders.attention import ATTENTIONS, DEFORMABLE, EncoderAttention, attention_names
from models.encoders.deformable import DeformableEncoder, DeformableEncoderLayer
from models.layers import Dropout, ExactLayerNorm
from models.levels import FeatureLevels

# N batch, S tokens of all levels, L levels, C width.


class AttentionBlock(nn.Module):
    """Attention, a residual connection and a norm."""

    def __init__(self, attention: EncoderAttention, width: int, dropout: float) -> None:
        super().__init__()
        self.attn = attention
        self.norm = ExactLayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, levels: FeatureLevels) -> Tensor:
        """Shape: x [N,S,C] -> the same."""
        output: Tensor = self.norm(x + self.dropout(self.attn(x, levels).to(x.dtype)))
        return output


class MixedEncoderLayer(DeformableEncoderLayer):
    """Several kinds of attention, one after the other, then a feed-forward block.

    The last one and what follows it have the keys of the paper's layer, so that weights of a
    deformable encoder, or of DETR's, fit; those before it are under `before`.
    """

    def __init__(self, options: EncoderOptions) -> None:
        *first, last = attention_names(options.attention)
        super().__init__(options, None if last == DEFORMABLE else ATTENTIONS[last](options))
        self.before = nn.ModuleList(
            AttentionBlock(ATTENTIONS[name](options), options.d_model, options.dropout)
            for name in first
        )

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        levels: FeatureLevels,
    ) -> Tensor:
        """Return the tokens after every attention. Shape: as of `DeformableEncoderLayer`."""
        for block in self.before:
            x = block(x, levels)
        return super().forward(x, pos, reference_points, x, levels)

    def attend(
        self,
        x: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        levels: FeatureLevels,
    ) -> Tensor:
        """Return what x finds. Shape: as of `DeformableEncoderLayer`."""
        if not isinstance(self.self_attn, EncoderAttention):
            return super().attend(x, pos, reference_points, tokens, levels)
        attended: Tensor = self.self_attn(x, levels)
        return attended


@ENCODERS.register("mixed")
class MixedEncoder(DeformableEncoder):
    """The paper's encoder with other layers."""

    def layer(self, options: EncoderOptions) -> nn.Module:
        """Return a new layer."""
        return MixedEncoderLayer(options)
