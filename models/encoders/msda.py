"""Multi-scale dilated attention (DilateFormer, arXiv 2302.01791, Sec. 3.1 and 3.2).

A cell looks at nine cells: itself and its neighbours at a distance of one cell, of two or of
three, by head. The cost grows with the number of cells, not with its square.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import EncoderOptions
from models.encoders.attention import ATTENTIONS, EncoderAttention
from util.errors import ConfigError

# N batch, H and W cells of a level, M heads, D channels of a head, C width.

DILATIONS = (1, 2, 3)  # of equal shares of the heads
_STEPS = (-1, 0, 1)  # of a 3x3 window


class MSDA(nn.Module):
    """Multi-scale dilated attention of one map, as published.

    Beyond the border, and in padding, keys and values are zeros that take part.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend to dilated neighbours; positions are added to queries and keys.

        Shape: x, pos [N,H,W,C]; padding_mask [N,H,W], True = padding; returns [N,H,W,C].
        """
        width = x.shape[3]
        parts = [2 * width, width]
        weights, biases = torch.split(self.qkv.weight, parts), torch.split(self.qkv.bias, parts)
        q, k = F.linear(x + pos, weights[0], biases[0]).chunk(2, dim=-1)
        v = F.linear(x, weights[1], biases[1])
        k, v = (t.masked_fill(padding_mask[..., None], 0.0) for t in (k, v))
        shares = zip(*(t.chunk(len(DILATIONS), dim=-1) for t in (q, k, v)), DILATIONS, strict=True)
        attended = [
            dilated_attention(*share, dilation=dilation, heads=self.heads // len(DILATIONS))
            for *share, dilation in shares
        ]
        output: Tensor = self.proj(torch.cat(attended, dim=-1))
        return output


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, *, dilation: int, heads: int) -> Tensor:
    """Let each cell attend to the 3x3 cells around it, `dilation` apart (Eq. 1 to 3).

    Keys are looked at in nine shifts, which are views: copies of all neighbours of all cells, as
    the published code makes them, take nine times the memory. Shape: [N,H,W,C] -> the same.
    """
    split = (*q.shape[:3], heads, -1)
    q, k, v = (t.reshape(split) for t in (q, k, v))  # [N,H,W,M,D]
    border = (0, 0, 0, 0, *[dilation] * 4)
    keys, values = (_shifts(F.pad(t, border), q.shape[1:3], dilation) for t in (k, v))
    logits = torch.stack([(q * key).sum(-1) for key in keys], dim=-1)  # [N,H,W,M,9]
    weights = (logits * q.shape[4] ** -0.5).softmax(-1)
    # softmax is exact under autocast: back to the precision of the values
    shares = weights.to(v.dtype)[..., None].unbind(4)
    attended = sum(share * value for share, value in zip(shares, values, strict=True))
    assert isinstance(attended, Tensor)
    return attended.flatten(3)


def _shifts(maps: Tensor, size: torch.Size, dilation: int) -> list[Tensor]:
    """Return views of maps with a border as each of the nine neighbours sees them, row by row."""
    height, width = size
    starts = [dilation * (1 + step) for step in _STEPS]
    return [maps[:, y : y + height, x : x + width] for y in starts for x in starts]


@ATTENTIONS.register("msda")
class MSDAttention(EncoderAttention):
    """MSDA within each level."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        for name, value in (("hidden_dim", options.d_model), ("nheads", options.n_heads)):
            if value % len(DILATIONS):
                raise ConfigError(
                    f"encoder_attn msda: {len(DILATIONS)} dilations share the heads equally, so "
                    f"{name} must be a multiple of {len(DILATIONS)}, not {value}. "
                    "Use `hidden_dim 288` and `nheads 9`."
                )
        self.msda = MSDA(options.d_model, options.n_heads)

    def attend(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend within one level. Shape: x, pos [N,H,W,C]; padding_mask [N,H,W]."""
        attended: Tensor = self.msda(x, pos, padding_mask)
        return attended

    def kept(self, height: int, width: int) -> int:
        """Return how many numbers the weights take."""
        return height * width * self.msda.heads * len(_STEPS) ** 2
