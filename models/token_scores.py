"""How a sparse encoder learns to score tokens: from where the decoder looks.

Sparse DETR, arXiv 2111.14330, Sec. 3.2. The decoder's attention map says how much each token gives
to the queries that detect. The tokens that give most are those that the encoder should change.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.sparse import SparseEncoder, best_tokens
from models.queries import DetectorOutput
from models.recipes import Recipe
from models.transformer import DeformableTransformer, TransformerOutput
from ops import MSDeformAttn
from ops.reference import sampling_locations
from util.batch import EffectiveBatch, Target

# N batch, Q queries, S tokens, M heads, L levels, K points, C width.

Shapes = Sequence[tuple[int, int]]


def attention_map(module: MSDeformAttn, query: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
    """Return how much each token counts in what queries find, summed up over queries and heads.

    The weight of a sampling point is shared out bilinearly to the four cells around it; what falls
    outside the map is lost.

    Shape: query [N,Q,C]; reference [N,Q,L,2 or 4], fractions; shapes L pairs (H, W) -> [N,S].
    """
    sizes = (*query.shape[:2], module.n_heads, module.n_levels, module.n_points)
    offsets = module.sampling_offsets(query).view(*sizes, 2)
    weights = module.attention_weights(query).view(sizes).flatten(3).softmax(-1).view(sizes)
    exact = torch.promote_types(query.dtype, torch.float32)
    places = sampling_locations(reference, offsets, list(shapes)).to(exact)
    maps = []
    for level, (height, width) in enumerate(shapes):
        at = places[:, :, :, level].flatten(1, 3)  # [N,Q*M*K,2]
        x, y = at[..., 0] * width - 0.5, at[..., 1] * height - 0.5
        weight = weights[:, :, :, level].flatten(1).to(exact)
        total = weight.new_zeros(len(query), height * width)
        for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
            column, row = x.floor() + right, y.floor() + below
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            cell = (row * width + column).masked_fill(~inside, 0).long()
            total = total.scatter_add(1, cell, (weight * share).masked_fill(~inside, 0.0))
        maps.append(total)
    return torch.cat(maps, dim=1)


class TokenScores(Recipe):
    """Teaches the scores of a `SparseEncoder`; it adds no queries and has no parameters.

    Hooks keep what attention of the decoder and the encoder's scorer are given in a step.
    """

    def __init__(self, transformer: DeformableTransformer) -> None:
        super().__init__(None, transformer, num_classes=0)  # it has no options, and no classes
        encoder = transformer.encoder
        assert isinstance(encoder, SparseEncoder)
        self.rho = encoder.rho
        self._looks: list[tuple[MSDeformAttn, Tensor, Tensor, Shapes]] = []
        self._scored: list[tuple[Tensor, Tensor]] = []
        # bound methods: a copy of the model has hooks of its own
        encoder.enc_mask_predictor.register_forward_hook(self._score)
        for layer in transformer.decoder.layers:
            layer.get_submodule("cross_attn").register_forward_pre_hook(self._look)

    def _score(self, module: nn.Module, inputs: tuple[Any, ...], scores: Tensor) -> None:
        if self.training:
            self._scored.append((scores, inputs[1]))

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.training:
            query, reference, _, shapes = inputs
            assert isinstance(module, MSDeformAttn)
            self._looks.append((module, query.detach(), reference.detach(), shapes))

    def prepare(
        self, targets: Sequence[Target], whole: EffectiveBatch, *, fixed_sizes: bool
    ) -> None:
        """Forget what recomputed activations have left."""
        self._looks.clear()
        self._scored.clear()

    def output(self, output: DetectorOutput, decoded: TransformerOutput) -> DetectorOutput:
        """Add the loss of the scores of each image, the mean over its unpadded tokens."""
        if not self.training:
            return output
        scores, padding = self._scored.pop()
        looks = self._looks[-len(decoded.decoder.hidden) :]
        self._looks.clear()
        detecting = decoded.groups[0].content.shape[1]
        with torch.no_grad():
            seen = torch.stack(
                [
                    attention_map(module, query[:, :detecting], reference[:, :detecting], shapes)
                    for module, query, reference, shapes in looks
                ]
            ).sum(0)
            tokens, among = best_tokens(seen, padding, self.rho)
            # of tokens that nobody looks at, none is better than another
            wanted = torch.zeros_like(seen).scatter(1, tokens, among.to(seen.dtype)) * (seen > 0)
        exact = torch.promote_types(scores.dtype, torch.float32)
        errors = F.binary_cross_entropy_with_logits(
            scores.to(exact).masked_fill(padding, 0.0), wanted.to(exact), reduction="none"
        )
        valid = ~padding
        means = errors.masked_fill(padding, 0.0).sum(1) / valid.sum(1)
        output["image_losses"] = {"loss_mask_prediction": means}
        return output
