"""Windows of three sizes at once, weighed against each other (V2X-ViT, arXiv 2203.10638, Sec. 3.3).

Small windows see what is near, with many heads; large ones see far, with few. Windows do not
overlap and are not shifted. Split attention (ResNeSt, arXiv 2004.08955) weighs them by channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import EncoderOptions
from models.encoders.attention import ATTENTIONS, EncoderAttention
from models.layers import ExactLayerNorm
from util.errors import ConfigError

# N batch, H and W cells of a level, B windows, T cells of a window, M heads, D channels of a head,
# C width.

WINDOWS = {4: 16, 8: 8, 16: 4}  # side of a window, in cells -> heads


class WindowAttention(nn.Module):
    """Attention within windows of one size, with a bias by displacement that all heads share."""

    def __init__(self, width: int, *, window: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.relative = nn.Parameter(torch.empty(2 * window - 1, 2 * window - 1))
        self.to_out = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias from the normal distribution, as published."""
        nn.init.normal_(self.relative)

    def forward(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend within windows; H and W are multiples of their side.

        Shape: x, pos [N,H,W,C]; padding_mask [N,H,W], True = padding; returns [N,H,W,C].
        """
        query_key, value_weight = torch.split(self.to_qkv.weight, [2 * x.shape[3], x.shape[3]])
        q, k = self._windows(F.linear(x + pos, query_key)).chunk(2, dim=-1)
        v = self._windows(F.linear(x, value_weight))
        split = (*q.shape[:2], self.heads, -1)
        q, k, v = (t.reshape(split).transpose(1, 2) for t in (q, k, v))  # [B,M,T,D]
        padded = self._windows(padding_mask[..., None])[..., 0]  # [B,T]
        # the lowest finite number: windows of nothing but padding must not become NaN
        bias = self.bias().to(q.dtype).expand(padded.shape[0], 1, -1, -1)
        bias = bias.masked_fill(padded[:, None, None], torch.finfo(q.dtype).min)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        output: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        side = self.window
        n, height, width, channels = x.shape
        grid = output.view(n, height // side, width // side, side, side, channels)
        return grid.transpose(2, 3).reshape(x.shape)

    def bias(self) -> Tensor:
        """Return what is added to the logits, by key minus query. Shape: [T,T]."""
        side = torch.arange(self.window, device=self.relative.device)
        y, x = (grid.flatten() for grid in torch.meshgrid(side, side, indexing="ij"))
        dy, dx = (place[None] - place[:, None] + self.window - 1 for place in (y, x))
        return self.relative[dy, dx]

    def _windows(self, maps: Tensor) -> Tensor:
        """Cut maps into windows. Shape: [N,H,W,C] -> [B,T,C]."""
        n, height, width, channels = maps.shape
        side = self.window
        grid = maps.view(n, height // side, side, width // side, side, channels)
        return grid.transpose(2, 3).reshape(-1, side * side, channels)


class SplitAttention(nn.Module):
    """Mix several maps, with weights for each channel that add up to one.

    What is in the image decides on them: they are computed from the mean of its unpadded cells.
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.fc1 = nn.Linear(width, width, bias=False)
        self.norm = ExactLayerNorm(width)
        self.fc2 = nn.Linear(width, width * branches, bias=False)

    def forward(self, maps: list[Tensor], padding_mask: Tensor) -> Tensor:
        """Shape: maps, each [N,H,W,C]; padding_mask [N,H,W] -> [N,H,W,C]."""
        stacked = torch.stack(maps, dim=1)  # [N,K,H,W,C]
        valid = (~padding_mask)[..., None].to(stacked.dtype)
        mean = (stacked.sum(1) * valid).sum((1, 2)) / valid.sum((1, 2))
        hidden = F.relu(self.norm(self.fc1(mean)))
        weights = self.fc2(hidden).unflatten(1, (self.branches, -1)).softmax(1)  # [N,K,C]
        mixed: Tensor = (stacked * weights[:, :, None, None]).sum(1)
        return mixed


class MSwin(nn.Module):
    """Window attention of several sizes at once and split attention, as published.

    `windows`: heads by side of the window in cells; the heads of a size share all channels.
    """

    def __init__(self, width: int, windows: dict[int, int]) -> None:
        super().__init__()
        self.multiple = max(windows)
        self.branches = nn.ModuleList(
            WindowAttention(width, window=window, heads=heads) for window, heads in windows.items()
        )
        self.fusion = SplitAttention(width, len(windows))

    def forward(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend within one level of any size; positions are added to queries and keys.

        Shape: x, pos [N,H,W,C]; padding_mask [N,H,W], True = padding; returns [N,H,W,C].
        """
        _, height, width, _ = x.shape
        below, right = -height % self.multiple, -width % self.multiple
        x, pos = (F.pad(t, (0, 0, 0, right, 0, below)) for t in (x, pos))
        padding_mask = F.pad(padding_mask, (0, right, 0, below), value=True)
        maps = [branch(x, pos, padding_mask) for branch in self.branches]
        mixed: Tensor = self.fusion(maps, padding_mask)
        return mixed[:, :height, :width]


@ATTENTIONS.register("mswin")
class MSwinAttention(EncoderAttention):
    """MSwin within each level; a level smaller than a window is one window."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        multiple = max(WINDOWS.values())
        if options.d_model % multiple:
            raise ConfigError(
                f"encoder_attn mswin: has up to {multiple} heads, so hidden_dim must be a multiple "
                f"of {multiple}, not {options.d_model}."
            )
        self.mswin = MSwin(options.d_model, WINDOWS)

    def attend(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Attend within one level. Shape: x, pos [N,H,W,C]; padding_mask [N,H,W]."""
        attended: Tensor = self.mswin(x, pos, padding_mask)
        return attended

    def reset_parameters(self) -> None:
        """Draw the biases of displacements."""
        for branch in self.mswin.branches:
            assert isinstance(branch, WindowAttention)
            branch.reset_parameters()

    def kept(self, height: int, width: int) -> int:
        """Return how many numbers the weights take: softmax and biases."""
        multiple = self.mswin.multiple
        cells = -(-height // multiple) * -(-width // multiple) * multiple**2
        return sum(cells * window**2 * (heads + 1) for window, heads in WINDOWS.items())
