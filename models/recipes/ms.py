"""Mixed supervision: the queries that detect learn one to many, too (MS-DETR, arXiv 2401.03989).

A query looks at the image before it learns of the others. Up to there it may find an object that
others find as well: a second feed-forward block, in training alone, predicts from it, and several
queries learn each object. Only what comes after self-attention has to find each object once.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.options import option
from models.decoder import DeformableDecoderLayer
from models.heads import apply_delta
from models.layers import Dropout, ExactLayerNorm
from models.one_to_many import assign_by_quality
from models.proposals import Proposals
from models.queries import DetectorOutput, GroupOutput, Learning, QueryGroup, Route
from models.recipes import RECIPES, Recipe, RecipeOptions
from models.transformer import DeformableTransformer, TransformerOutput

# N batch, Q queries, C width.


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Options of MS-DETR."""

    ms_cls_factor: float = option(
        0.5,
        "weight of the class loss of the queries that detect, as a part of cls_loss_coef",
        above=0,
        rare=True,
    )


class AuxiliaryBlock(nn.Module):
    """A feed-forward block. Its parameters have their official names."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float) -> None:
        super().__init__()
        self.linear3 = nn.Linear(d_model, d_ffn)
        self.linear4 = nn.Linear(d_ffn, d_model)
        self.norm4 = ExactLayerNorm(d_model)
        self.dropout = Dropout(dropout)
        for linear in (self.linear3, self.linear4):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N,Q,C] -> the same."""
        hidden = self.dropout(F.relu(self.linear3(x)))
        output: Tensor = self.norm4(x + self.dropout(self.linear4(hidden).to(x.dtype)))
        return output


@RECIPES.register("ms")
class MS(Recipe):
    """A decoder that looks at the image first, and what learns one to many in each layer.

    That is every layer, whether or not the detections of all layers learn.
    """

    options_class = Options
    detects = True

    def __init__(
        self, options: Options, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__(options, transformer, num_classes=num_classes)
        layers = [x for x in transformer.decoder.layers if isinstance(x, DeformableDecoderLayer)]
        for layer in layers:
            layer.cross_first = True
        self.layers = nn.ModuleList(
            AuxiliaryBlock(transformer.d_model, layer.linear1.out_features, layer.dropout.p)
            for layer in layers
        )
        decoder = transformer.decoder
        self.heads = decoder.heads
        for heads in (self.heads.class_embed, self.heads.bbox_embed):
            heads.requires_grad_(True)  # those of all layers learn, without `aux_loss` too
        self.clamp = (decoder.refine_eps,) if decoder.with_box_refine else ()  # as it does
        self.factors = {"loss_ce": options.ms_cls_factor}

    def regroup(
        self,
        transformer: DeformableTransformer,
        groups: list[QueryGroup],
        proposals: Proposals | None,
        *,
        learning: bool,
    ) -> list[QueryGroup]:
        """Read the queries that detect aside in training, and match the encoder on its anchors."""
        detecting, *others = groups
        detecting = replace(
            detecting,
            learning=replace(detecting.learning, factors=self.factors),
            encoder=None if proposals is None else proposals.output(on_anchors=True),
            routes=[Route(aside=block) for block in self.layers] if learning else (),
        )
        return [detecting, *others]

    def output(self, output: DetectorOutput, decoded: TransformerOutput) -> DetectorOutput:
        """Add what the blocks predict, from the same references and by the same heads."""
        decoder = decoded.decoder
        if not decoder.aside:
            return output
        size = decoder.aside[0].shape[1]
        tokens = decoder.class_tokens
        logits = [self.heads.logits(i, x, tokens) for i, x in enumerate(decoder.aside)]
        boxes = [
            apply_delta(self.heads.delta(i, x), reference[:, :size], *self.clamp)
            for i, (x, reference) in enumerate(zip(decoder.aside, decoder.references, strict=True))
        ]
        learning = Learning(assign=assign_by_quality)
        many = GroupOutput("_one2many", torch.stack(logits), torch.stack(boxes), learning)
        first, *others = output["groups"]
        result: DetectorOutput = {
            "pred_logits": output["pred_logits"],
            "pred_boxes": output["pred_boxes"],
            "groups": [first, many, *others],
        }
        return result
