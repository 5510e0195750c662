"""Grounding DINO's feature enhancer: image and class tokens learn of each other (arXiv 2303.05499).

In every layer, image tokens and class tokens look at each other, class tokens at other class
tokens, and image tokens at other image tokens, by deformable attention (Sec. 3.1). There, class
tokens are words of a text. Here a class has one token, which is learned; a prompt replaces them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import ENCODERS, Encoder, EncoderOptions
from models.encoders.deformable import DeformableEncoderLayer
from models.layers import Dropout, ExactLayerNorm, checkpointed, sine_embedding
from models.levels import FeatureLevels, cell_centres
from util.errors import ConfigError

# N batch, S image tokens of all levels, T class tokens, M heads, D channels of a head, C width.

_LAYER_SCALE = 1e-4  # of what fusion adds, at the start


class Fusion(nn.Module):
    """Image tokens and class tokens look at each other, with the same products (Fig. 3, block 2).

    Either side is normalised first. What it learns is added with a learned scale per channel. There
    are half as many heads as in the encoder, of half the feed-forward width together.
    """

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        width, inner = options.d_model, options.d_ffn // 2
        self.heads = options.n_heads // 2
        self.image_norm, self.token_norm = ExactLayerNorm(width), ExactLayerNorm(width)
        self.image_key, self.token_key = nn.Linear(width, inner), nn.Linear(width, inner)
        self.image_value, self.token_value = nn.Linear(width, inner), nn.Linear(width, inner)
        self.image_out, self.token_out = nn.Linear(inner, width), nn.Linear(inner, width)
        self.image_scale = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.token_scale = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.dropout = Dropout(options.dropout)

    def forward(self, x: Tensor, tokens: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return both sides. Shape: x [N,S,C]; tokens [N,T,C]; padding_mask [N,S]."""
        x, tokens = self.image_norm(x), self.token_norm(tokens)
        image, classes = self._split(self.image_key(x)), self._split(self.token_key(tokens))
        # PyTorch's fused kernels write no products out, so that computing them twice costs less
        to_image = F.scaled_dot_product_attention(
            image, classes, self._split(self.token_value(tokens))
        )
        visible = ~padding_mask[:, None, None].expand(-1, -1, tokens.shape[1], -1)
        to_classes = F.scaled_dot_product_attention(
            classes, image, self._split(self.image_value(x)), attn_mask=visible
        )
        to_image = self.image_out(to_image.transpose(1, 2).flatten(2)).to(x.dtype)
        to_classes = self.token_out(to_classes.transpose(1, 2).flatten(2)).to(tokens.dtype)
        return (
            x + self.dropout(self.image_scale * to_image),
            tokens + self.dropout(self.token_scale * to_classes),
        )

    def reset_parameters(self) -> None:
        """Start without biases, as published."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def _split(self, x: Tensor) -> Tensor:
        """Split channels among heads. Shape: [N,T,M*D] -> [N,M,T,D]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class TokenLayer(nn.Module):
    """Self-attention of class tokens, then a feed-forward block of half the image's width."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        width, inner = options.d_model, options.d_ffn // 2
        self.self_attn = nn.MultiheadAttention(width, options.n_heads // 2, batch_first=True)
        self.norm1 = ExactLayerNorm(width)
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)
        self.norm2 = ExactLayerNorm(width)
        self.dropout = Dropout(options.dropout)

    def forward(self, tokens: Tensor, pos: Tensor | None, apart: Tensor | None) -> Tensor:
        """Return the tokens after a look at each other.

        Shape: tokens [N,T,C]; pos [T,C]; apart [T,T], True where a token (row) must not attend to
            another.
        """
        query = tokens if pos is None else tokens + pos
        attended = self.self_attn(query, query, tokens, attn_mask=apart, need_weights=False)[0]
        tokens = self.norm1(tokens + self.dropout(attended.to(tokens.dtype)))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(tokens))))
        output: Tensor = self.norm2(tokens + self.dropout(hidden.to(tokens.dtype)))
        return output


@ENCODERS.register("enhancer")
class EnhancerEncoder(Encoder):
    """The paper's encoder with class tokens beside the image's.

    Learned class tokens have no order, and all of them see each other. Words of a prompt have
    positions `token_pos` [T,C], and only those of one phrase see each other: see `token_apart`
    [T,T] in `TokenLayer`.
    """

    token_pos: Tensor | None
    token_apart: Tensor | None

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        if not options.num_classes:
            raise ConfigError("encoder enhancer: choose it by `encoder_attn enhancer`.")
        if options.n_heads % 2 or options.d_ffn % options.n_heads:
            raise ConfigError(
                "encoder_attn enhancer: image and classes meet in half of `nheads` heads, with "
                "half of `dim_feedforward` channels: `nheads` must be even, and `dim_feedforward` "
                f"a multiple of it, not {options.n_heads} and {options.d_ffn}."
            )
        count = range(options.num_layers)
        self.class_tokens = nn.Embedding(options.num_classes, options.d_model)
        self.layers = nn.ModuleList(DeformableEncoderLayer(options) for _ in count)
        self.fusions = nn.ModuleList(Fusion(options) for _ in count)
        self.token_layers = nn.ModuleList(TokenLayer(options) for _ in count)
        for name in ("token_pos", "token_apart"):
            self.register_buffer(name, None, persistent=False)

    def reset_parameters(self) -> None:
        """Set what must not start like an ordinary matrix."""
        self.class_tokens.reset_parameters()
        for fusion in self.fusions:
            assert isinstance(fusion, Fusion)
            fusion.reset_parameters()

    def place_tokens(self, positions: Tensor, together: Tensor) -> None:
        """Say which place each word of a prompt has in its phrase, and which words see each other.

        Shape: positions [T], whole numbers; together [T,T], True where two words see each other.
        """
        weight = self.class_tokens.weight
        turns = positions.to(weight) * (2 * math.pi)  # as published
        self.token_pos = sine_embedding(turns, weight.shape[1])
        self.token_apart = ~together.to(weight.device)

    def forward(self, levels: FeatureLevels) -> tuple[Tensor, Tensor]:
        """Return the memory and the class tokens. Shape: [N,S,C] and [N,T,C]."""
        reference_points, again = cell_centres(levels), self.checkpointing
        x = levels.tokens
        tokens = self.class_tokens.weight.expand(x.shape[0], -1, -1)
        parts = zip(self.fusions, self.token_layers, self.layers, strict=True)
        for fusion, token_layer, layer in parts:
            x, tokens = checkpointed(fusion, x, tokens, levels.padding_mask, enabled=again)
            words = tokens, self.token_pos, self.token_apart
            tokens = checkpointed(token_layer, *words, enabled=again)
            around = levels.pos, reference_points, x, levels
            x = checkpointed(layer, x, *around, enabled=again)
        return x, tokens
