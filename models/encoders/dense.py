"""Dense attention: every token looks at every other of its level (DETR, arXiv 2005.12872)."""

from torch import Tensor, nn

from models.encoders import EncoderOptions
from models.encoders.attention import ATTENTIONS, EncoderAttention

# N batch, H and W cells of a level, C width.


@ATTENTIONS.register("dense")
class DenseAttention(EncoderAttention):
    """DETR's self-attention; positions are added to queries and keys (DETR, Sec. A.3).

    Its weights are a matrix of the square of the number of cells. PyTorch's fused kernels never
    write it out, but on the CPU they know no dropout.
    """

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(
            options.d_model, options.n_heads, dropout=options.dropout, batch_first=True
        )

    def attend(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend within one level. Shape: x, pos [N,H,W,C]; padding_mask [N,H,W]."""
        value = x.flatten(1, 2)
        query = value + pos.flatten(1, 2)
        attended: Tensor = self.attn(
            query, query, value, key_padding_mask=padding_mask.flatten(1), need_weights=False
        )[0]
        return attended.view_as(x)

    def kept(self, height: int, width: int) -> int:
        """Return how many numbers the weights take: of softmax, dropout and both."""
        if self.attn.dropout == 0 or self.attn.in_proj_weight.device.type != "cpu":
            return 0
        numbers: int = 3 * self.attn.num_heads * (height * width) ** 2
        return numbers
