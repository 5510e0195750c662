"""The deformable encoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import ENCODERS, Encoder, EncoderOptions
from models.layers import Dropout, ExactLayerNorm, checkpointed
from models.levels import FeatureLevels, cell_centres
from ops import MSDeformAttn

# N batch, S tokens of all levels, L levels, C width.


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block (Sec. 4.1).

    A token predicts where to look and how much each place counts, and is never compared with keys
    (Eq. 3): there are no dot products to divide by the square root of their length.
    """

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        width = options.d_model
        self.self_attn = MSDeformAttn(width, options.n_levels, options.n_heads, options.n_points)
        self.norm1 = ExactLayerNorm(width)
        self.linear1 = nn.Linear(width, options.d_ffn)
        self.linear2 = nn.Linear(options.d_ffn, width)
        self.norm2 = ExactLayerNorm(width)
        self.dropout = Dropout(options.dropout)

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


@ENCODERS.register("deformable")
class DeformableEncoder(Encoder):
    """The paper's encoder: each token looks around its own cell's centre, on every level."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        layers = [DeformableEncoderLayer(options) for _ in range(options.num_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the memory. Shape: [N,S,C]."""
        reference_points = cell_centres(levels)
        x = levels.tokens
        for layer in self.layers:
            x = checkpointed(layer, x, levels, reference_points, enabled=self.checkpointing)
        return x
