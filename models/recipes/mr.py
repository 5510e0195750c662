"""Three ways through one decoder, two of them one to many (Mr. DETR, arXiv 2412.10028).

In training, queries pass the decoder twice more than those that detect, and several learn each
object. The first time, the same queries have a feed-forward block of their own in every layer. The
second time, others pass all of the layers, but learned tokens in self-attention tell them that
duplicates are welcome.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.options import option
from models.decoder import DeformableDecoderLayer
from models.layers import Dropout, ExactLayerNorm
from models.one_to_many import FurtherHeads, assign_by_quality
from models.proposals import Proposals
from models.queries import Learning, QueryGroup, Route
from models.recipes import RECIPES, Recipe, RecipeOptions
from models.transformer import DeformableTransformer
from models.two_stage import TwoStageTransformer

_ONE_TO_MANY = Learning(assign=assign_by_quality)


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Options of Mr. DETR."""

    mr_tokens: int = option(
        10, "learned tokens that self-attention of one of the ways has", low=1, most=1000, rare=True
    )
    mr_enc_factor: float = option(
        3.0,
        "two-stage: weight of the encoder's losses, as a multiple of the coefficients",
        above=0,
        rare=True,
    )


class FeedForward(nn.Module):
    """The two linear layers of a feed-forward block."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout = Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N,Q,C] -> the same."""
        output: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return output


class OwnParts(nn.Module):
    """What the two ways have for themselves in one decoder layer. Shape: tokens [2,T,C]."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, tokens: int) -> None:
        super().__init__()
        self.feed_forward = FeedForward(d_model, d_ffn, dropout)
        self.tokens = nn.Parameter(torch.randn(2, tokens, d_model))
        self.norm = ExactLayerNorm(d_model)


@RECIPES.register("mr")
class Mr(Recipe):
    """The two ways that learn one to many: "_sep", with other blocks, and "_one2many"."""

    options_class = Options

    def __init__(
        self, options: Options, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__(options, transformer, num_classes=num_classes)
        layers = [x for x in transformer.decoder.layers if isinstance(x, DeformableDecoderLayer)]
        self.layers = nn.ModuleList(
            OwnParts(transformer.d_model, x.linear1.out_features, x.dropout.p, options.mr_tokens)
            for x in layers
        )
        self.encoder_heads: FurtherHeads | None = None
        if isinstance(transformer, TwoStageTransformer):
            scores = num_classes if transformer.class_proposals else 1
            self.encoder_heads = FurtherHeads(transformer.d_model, scores=scores)
        self.encoder_factor = options.mr_enc_factor

    def regroup(
        self,
        transformer: DeformableTransformer,
        groups: list[QueryGroup],
        proposals: Proposals | None,
        *,
        learning: bool,
    ) -> list[QueryGroup]:
        """Add the two groups in training, and match the encoder on its anchors."""
        detecting, *others = groups
        more = self._more(transformer, detecting, proposals) if learning else []
        if proposals is not None:
            encoder = proposals.output(on_anchors=True, weight=self.encoder_factor)
            detecting = replace(detecting, encoder=encoder)
        return [detecting, *others, *more]

    def _more(
        self,
        transformer: DeformableTransformer,
        detecting: QueryGroup,
        proposals: Proposals | None,
    ) -> list[QueryGroup]:
        own = [layer for layer in self.layers if isinstance(layer, OwnParts)]
        separate, instructed = (
            [Route(feed_forward=x.feed_forward) for x in own],
            [Route(tokens=x.tokens, norm=x.norm) for x in own],
        )
        same = replace(detecting, learning=_ONE_TO_MANY, encoder=None)
        other = same
        if proposals is not None:
            assert self.encoder_heads is not None
            assert isinstance(transformer, TwoStageTransformer)
            found: Proposals = self.encoder_heads(proposals, transformer)
            boxes = found.best(0, transformer.num_queries)
            other = transformer.from_boxes("", boxes, None, _ONE_TO_MANY)
            if transformer.learned_width:
                other = replace(other, content=detecting.content)
            encoder = found.output("_one2many_enc", on_anchors=True, weight=self.encoder_factor)
            other = replace(other, encoder=encoder)
        return [
            replace(same, name="_sep", routes=separate),
            replace(other, name="_one2many", routes=instructed),
        ]
