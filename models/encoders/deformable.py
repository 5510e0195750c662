"""The deformable encoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import ENCODERS, Encoder, EncoderOptions
from models.layers import Dropout, ExactLayerNorm
from models.levels import FeatureLevels, cell_centres
from models.recompute import checkpointed
from ops import MSDeformAttn

# N batch, S tokens of all levels, L levels, C width.


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block."""

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
        self.self_attn = MSDeformAttn(
            d_model, n_levels=n_levels, n_heads=n_heads, n_points=n_points
        )
        self.norm1 = ExactLayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm2 = ExactLayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, levels: FeatureLevels, reference_points: Tensor) -> Tensor:
        """Shape: x [N,S,C]; reference_points [N,S,L,2]; returns [N,S,C]."""
        attended = self.self_attn(
            x + levels.pos,
            reference_points,
            x,
            levels.spatial_shapes,
            input_padding_mask=levels.padding_mask,
        )
        x = self.norm1(x + self.dropout(attended.to(x.dtype)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        output: Tensor = self.norm2(x + self.dropout(self.linear2(hidden).to(x.dtype)))
        return output


class DeformableEncoder(Encoder):
    """A stack of encoder layers; each token's reference is its own cell centre."""

    def __init__(self, layers: list[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the memory. Shape: [N,S,C]."""
        reference_points = cell_centres(levels)
        x = levels.tokens
        for layer in self.layers:
            x = checkpointed(layer, x, levels, reference_points, enabled=self.checkpointing)
        return x


@ENCODERS.register("deformable")
def create_deformable_encoder(options: EncoderOptions) -> Encoder:
    """Build the paper's encoder."""
    layers = [
        DeformableEncoderLayer(
            options.d_model,
            d_ffn=options.d_ffn,
            dropout=options.dropout,
            n_levels=options.n_levels,
            n_heads=options.n_heads,
            n_points=options.n_points,
        )
        for _ in range(options.num_layers)
    ]
    return DeformableEncoder(layers)
