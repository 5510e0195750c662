"""An encoder that changes only a part of the tokens, the same in all layers (Sparse DETR).

Roh et al., arXiv 2111.14330. Most tokens show background that no query looks at. A small network
scores all of them; the best pass the layers, where they look at all tokens, and the others stay as
the backbone made them (Sec. 3.1). What it learns from is in `models/token_scores.py`.
"""

import torch
from torch import Tensor, nn

from models.encoders import UPDATES, EncoderOptions
from models.encoders.deformable import DeformableEncoder
from models.encoders.fusion import fused
from models.layers import ExactLayerNorm, ExactLinear, checkpointed
from models.levels import FeatureLevels, cell_centres

# N batch, S tokens of all levels, T of them that change, L levels, C width.


class TokenScorer(nn.Module):
    """Scores of tokens, from each by itself and the mean of its image (Sparse DETR, Sec. A.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(ExactLayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.layer2 = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            ExactLinear(width // 4, 1),
        )

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """Score tokens; padding is no part of the mean, and its scores mean nothing.

        Shape: x [N,S,C]; padding_mask [N,S], True = padding -> [N,S].
        """
        own, shared = self.layer1(x).chunk(2, dim=-1)
        valid = (~padding_mask)[..., None].to(shared.dtype)
        mean = (shared * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        scores: Tensor = self.layer2(torch.cat([own, mean.expand_as(own)], dim=-1))
        return scores[..., 0]


def best_tokens(scores: Tensor, padding_mask: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Return the tokens with the best scores, and which of these are among their image's part.

    Of an image with n unpadded tokens, these are the first floor(part n) + 1, at most n.

    Shape: scores, padding_mask [N,S] -> both [N,T], T enough for an image without padding.
    """
    # also of a size that is left open in a file for other runtimes
    most = torch.sym_min(torch.sym_int(scores.shape[1] * part) + 1, scores.shape[1])
    valid = (~padding_mask).sum(1)
    counts = torch.minimum((valid.double() * part).long() + 1, valid)
    tokens = scores.detach().masked_fill(padding_mask, -torch.inf).topk(most, dim=1).indices
    return tokens, torch.arange(most, device=scores.device) < counts[:, None]


@UPDATES.register("sparse")
class SparseEncoder(DeformableEncoder):
    """All layers change the same tokens, `options.rho` of those of each image."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__(options)
        self.rho = options.rho
        self.enc_mask_predictor = TokenScorer(options.d_model)

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the memory. Shape: [N,S,C]."""
        x, padding = levels.tokens, levels.padding_mask
        scores = self.enc_mask_predictor(x + levels.pos, padding)
        tokens, changed = best_tokens(scores, padding, self.rho)

        def chosen(values: Tensor) -> Tensor:
            flat = values.flatten(2)
            found = flat.gather(1, tokens[..., None].expand(-1, -1, flat.shape[2]))
            return found.view(*tokens.shape, *values.shape[2:])

        pos, references = chosen(levels.pos), chosen(cell_centres(levels))
        place = tokens[..., None].expand(-1, -1, x.shape[2])
        fusion = self.fusion_layer if self.memory_fusion is None else self.memory_fusion
        states = [x]
        for layer in self.layers:
            before = chosen(x)
            after = checkpointed(
                layer, before, pos, references, x, levels, enabled=self.checkpointing
            )
            x = x.scatter(1, place, torch.where(changed[..., None], after, before))
            if fusion is not None:
                states.append(x)
        return x if fusion is None else fused(fusion, states)
