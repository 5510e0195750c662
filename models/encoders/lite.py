"""An encoder that changes coarse tokens often and fine ones rarely (Lite DETR, arXiv 2303.07335).

Three quarters of all tokens are those of the finest level. They are needed for small objects, but
not in every layer: between full layers, coarse tokens alone look at all tokens (Sec. 3.3). What
the paper adds to the attention of these layers, weights that depend on keys, is left out.
"""

import torch
from torch import Tensor

from models.encoders import UPDATES, EncoderOptions
from models.encoders.deformable import DeformableEncoder
from models.layers import checkpointed
from models.levels import FeatureLevels

# N batch, S tokens of all levels, L levels, C width.


@UPDATES.register("lite")
class LiteEncoder(DeformableEncoder):
    """Blocks of equal length, each of which ends with a full layer; keys are the full encoder's.

    Before it, the coarsest `lite_levels` change alone.
    """

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__(options)
        self.block = options.num_layers // options.lite_expansion
        self.coarse = options.lite_levels

    def update(
        self, index: int, x: Tensor, levels: FeatureLevels, reference_points: Tensor
    ) -> Tensor:
        """Return the tokens after a layer. Shape: x [N,S,C]; reference_points [N,S,L,2]."""
        if (index + 1) % self.block == 0:
            return super().update(index, x, levels, reference_points)
        fine = sum(height * width for height, width in levels.spatial_shapes[: -self.coarse])
        coarse = checkpointed(
            self.layers[index],
            *(x[:, fine:], levels.pos[:, fine:], reference_points[:, fine:], x, levels),
            enabled=self.checkpointing,
        )
        return torch.cat([x[:, :fine], coarse], dim=1)
