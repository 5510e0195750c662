"""DAT's deformable attention (arXiv 2201.00520, Sec. 3.2) within each level.

The cells of a level share points, which an offset network moves to where the image asks for them;
weights come from queries and keys, and from how a point lies to a query. The cost is that of dense
attention divided by the square of the distance between points.
"""

from torch import Tensor, nn

from models.dat_attention import DATAttention
from models.encoders import EncoderOptions
from models.encoders.attention import ATTENTIONS, EncoderAttention
from util.errors import ConfigError

# N batch, H and W cells of a level, C width.

_KERNEL = 5  # cells that the offset network sees, as in DAT's third stage
_TABLE = 28  # side of the bias table's maps: those of stride 8 of an image of 224 pixels
_SHARING = 2  # heads with the same points, as in all published sizes


@ATTENTIONS.register("dat")
class DATEncoderAttention(EncoderAttention):
    """DAT's attention on the corrected grid; positions are added to queries and keys."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        if options.n_heads % _SHARING:
            raise ConfigError(
                f"encoder_attn dat: {_SHARING} heads share their points, so nheads must be a "
                f"multiple of {_SHARING}, not {options.n_heads}."
            )
        self.dat = DATAttention(
            options.d_model,
            heads=options.n_heads,
            groups=options.n_heads // _SHARING,
            kernel=_KERNEL,
            table=_TABLE,
            stride=options.dat_stride,
        )

    def attend(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend within one level. Shape: x, pos [N,H,W,C]; padding_mask [N,H,W]."""
        x, pos = (t.permute(0, 3, 1, 2) for t in (x, pos))
        attended: Tensor = self.dat(x, padding_mask, pos)
        return attended.permute(0, 2, 3, 1)

    def reset_parameters(self) -> None:
        """Draw the bias table at random, as published."""
        nn.init.trunc_normal_(self.dat.rpe_table, std=0.01)

    def kept(self, height: int, width: int) -> int:
        """Return how many numbers the weights take: softmax, and where the bias is read."""
        stride = self.dat.stride
        pairs = height * width * -(-height // stride) * -(-width // stride)
        return pairs * (self.dat.heads + 2 * self.dat.groups)
