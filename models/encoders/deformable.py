"""The deformable encoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import UPDATES, Encoder, EncoderOptions
from models.encoders.fusion import dense_fusion, fused, mlp_fusion
from models.layers import Dropout, ExactLayerNorm, checkpointed
from models.levels import FeatureLevels, cell_centres
from ops import MSDeformAttn

# N batch, S tokens of all levels, T of them that a layer changes, L levels, C width.


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block (Sec. 4.1).

    A token predicts where to look and how much each place counts, and is never compared with keys
    (Eq. 3): there are no dot products to divide by the square root of their length.
    """

    def __init__(self, options: EncoderOptions, attention: nn.Module | None = None) -> None:
        super().__init__()
        width = options.d_model
        self.self_attn = attention or MSDeformAttn(
            width, options.n_levels, options.n_heads, options.n_points
        )
        self.norm1 = ExactLayerNorm(width)
        self.linear1 = nn.Linear(width, options.d_ffn)
        self.linear2 = nn.Linear(options.d_ffn, width)
        self.norm2 = ExactLayerNorm(width)
        self.dropout = Dropout(options.dropout)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        levels: FeatureLevels,
    ) -> Tensor:
        """Return x, some of the tokens, after a look at all of them.

        Shape: x, pos [N,T,C]; reference_points [N,T,L,2]; tokens [N,S,C]; returns [N,T,C].
        """
        attended = self.attend(x, pos, reference_points, tokens, levels)
        x = self.norm1(x + self.dropout(attended.to(x.dtype)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        output: Tensor = self.norm2(x + self.dropout(self.linear2(hidden).to(x.dtype)))
        return output

    def attend(
        self,
        x: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        levels: FeatureLevels,
    ) -> Tensor:
        """Return what x finds in all of the tokens. Shape: as of `forward`."""
        attended: Tensor = self.self_attn(
            x + pos,
            reference_points,
            tokens,
            levels.spatial_shapes,
            input_padding_mask=levels.padding_mask,
        )
        return attended


@UPDATES.register("full")
class DeformableEncoder(Encoder):
    """The paper's encoder: each token looks around its own cell's centre, on every level.

    With a `fusion` (see `models/encoders/fusion.py`), the memory is made of the tokens before and
    after every layer.
    """

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer(options) for _ in range(options.num_layers))
        # each under its published key
        self.fusion_layer, self.memory_fusion = dense_fusion(options), mlp_fusion(options)

    def layer(self, options: EncoderOptions) -> nn.Module:
        """Return a new layer, which is called as `DeformableEncoderLayer` is."""
        return DeformableEncoderLayer(options)

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the memory. Shape: [N,S,C]."""
        reference_points = cell_centres(levels)
        x = levels.tokens
        fusion = self.fusion_layer if self.memory_fusion is None else self.memory_fusion
        states = [x]
        for index in range(len(self.layers)):
            x = self.update(index, x, levels, reference_points)
            if fusion is not None:
                states.append(x)
        return x if fusion is None else fused(fusion, states)

    def update(
        self, index: int, x: Tensor, levels: FeatureLevels, reference_points: Tensor
    ) -> Tensor:
        """Return the tokens after a layer. Shape: x [N,S,C]; reference_points [N,S,L,2]."""
        output: Tensor = checkpointed(
            self.layers[index],
            *(x, levels.pos, reference_points, x, levels),
            enabled=self.checkpointing,
        )
        return output
