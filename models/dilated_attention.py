"""Multi-scale dilated attention (DilateFormer, arXiv 2302.01791, Eq. 1 to 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# N batch, C channels, H and W cells, M heads, D channels per head, K cells of a neighbourhood.


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, *, dilation: int, kernel: int = 3) -> Tensor:
    """Let every cell attend to `kernel` x `kernel` cells around it, `dilation` cells apart.

    Neighbours beyond the border take part with a key and a value of zero, as published.

    Shape: q, k, v [N,H,W,M,D] -> [N,H,W,M,D].
    """
    height, width = q.shape[1:3]
    reach = dilation * (kernel // 2)
    border = (0, 0, 0, 0, reach, reach, reach, reach)
    k, v = F.pad(k, border), F.pad(v, border)
    steps = [dilation * i for i in range(kernel)]
    # each neighbour is a view of the padded map: copying them all out would take K times its memory
    seen = [(slice(y, y + height), slice(x, x + width)) for y in steps for x in steps]
    products = torch.stack([(q * k[:, rows, columns]).sum(-1) for rows, columns in seen], -1)
    weights = (products * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)  # [N,H,W,M,K]
    total = torch.zeros_like(q)
    for weight, (rows, columns) in zip(weights.unbind(-1), seen, strict=True):
        total = total + weight[..., None] * v[:, rows, columns]
    return total


class MultiDilatedAttention(nn.Module):
    """Heads in equal parts that look at neighbours 1, 2, 3, ... cells apart.

    Raises:
        ValueError: the heads cannot be divided by the number of dilations.
    """

    def __init__(
        self, channels: int, *, heads: int, kernel: int = 3, dilations: tuple[int, ...] = (1, 2, 3)
    ) -> None:
        super().__init__()
        if heads % len(dilations) or channels % heads:
            raise ValueError(
                f"{channels} channels in {heads} heads cannot be shared by {len(dilations)} "
                "dilations: heads must be a multiple of their number, channels of heads"
            )
        self.heads, self.kernel, self.dilations = heads, kernel, dilations
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Attend. Padding counts as what lies beyond the border.

        Shape: x [N,C,H,W]; padding [N,H,W], True = padding -> [N,C,H,W].
        """
        batch, channels, height, width = x.shape
        qkv: Tensor = self.qkv(x).permute(0, 2, 3, 1)
        shape = (batch, height, width, 3, self.heads, channels // self.heads)
        q, k, v = qkv.reshape(shape).unbind(3)  # [N,H,W,M,D]
        if padding is not None:
            k, v = (t.masked_fill(padding[..., None, None], 0) for t in (k, v))
        count = len(self.dilations)
        parts = zip(*(t.chunk(count, dim=3) for t in (q, k, v)), self.dilations, strict=True)
        found = [
            dilated_attention(q_, k_, v_, dilation=dilation, kernel=self.kernel)
            for q_, k_, v_, dilation in parts
        ]
        y: Tensor = self.proj(torch.cat(found, dim=3).flatten(3))
        return y.permute(0, 3, 1, 2)
