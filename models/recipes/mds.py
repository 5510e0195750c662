"""Find many, keep one: a decoder learns one to many, its last layer suppresses duplicates.

MDS-DETR, arXiv 2605.23507. In the decoder, several queries learn each object, so that it learns
from many more boxes than by one-to-one matching. One more layer, in which a query sees only those
with a better score, learns to let the best of them stand.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.options import option
from models.decoder import DeformableDecoderLayer
from models.heads import MLP
from models.initial_values import start_at_prior, start_at_zero
from models.layers import ExactLayerNorm, ExactLinear
from models.one_to_many import assign_by_quality
from models.proposals import Proposals
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput, Learning, QueryGroup
from models.recipes import RECIPES, Recipe, RecipeOptions
from models.relations import RELATED, symmetric_bias
from models.transformer import DeformableTransformer, TransformerOutput

# N batch, Q queries, C width, H heads.

_TOKENS = 10  # what a query can look at where none is better


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Options of MDS-DETR."""

    mds_cls_factor: float = option(
        0.5,
        "weight of the class loss of the decoder's layers, as a part of cls_loss_coef",
        above=0,
        rare=True,
    )


@RECIPES.register("mds")
class MDS(Recipe):
    """A decoder that finds each object many times, and the layer that keeps one."""

    options_class = Options
    detects = True

    def __init__(
        self, options: Options, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__(options, transformer, num_classes=num_classes)
        layers = [x for x in transformer.decoder.layers if isinstance(x, DeformableDecoderLayer)]
        for layer in layers:
            layer.cross_first = True
        self.suppressor = Suppressor(
            transformer.d_model, layers[0].self_attn.num_heads, layers[0].linear1.out_features
        )
        self.class_embed = ExactLinear(transformer.d_model, num_classes)
        start_at_prior(self.class_embed.bias)
        self.one_to_many = Learning(
            assign=assign_by_quality, factors={"loss_ce": options.mds_cls_factor}
        )

    def detecting_heads(self) -> list[nn.Module]:
        """Return the class head of the last layer."""
        return [self.class_embed]

    def regroup(
        self,
        transformer: DeformableTransformer,
        groups: list[QueryGroup],
        proposals: Proposals | None,
        *,
        learning: bool,
    ) -> list[QueryGroup]:
        """Let the queries of the decoder learn one to many in a training step."""
        detecting, *others = groups
        if learning:
            detecting = replace(detecting, learning=self.one_to_many)
        return [detecting, *others]

    def output(self, output: DetectorOutput, decoded: TransformerOutput) -> DetectorOutput:
        """Return the boxes of the last decoder layer with the scores that are left of them.

        The scores of the decoder's own layers learn one to many. Its boxes do not learn from the
        suppressor, which has only to choose among them.
        """
        many = output["groups"][0]
        size = many.logits.shape[2]
        boxes = output["pred_boxes"].detach()
        hidden = decoded.decoder.hidden[-1][:, :size]
        logits = self.class_embed(self.suppressor(hidden, output["pred_logits"], boxes))
        groups = [GroupOutput("", logits[None], boxes[None], ONE_TO_ONE)]
        if many.learning.assign is not None:
            groups.append(replace(many, name="_one2many"))
        groups += output["groups"][1:]
        if decoded.proposals is not None:
            groups[-1] = decoded.proposals.output(on_anchors=True)
        result: DetectorOutput = {
            "pred_logits": logits,
            "pred_boxes": output["pred_boxes"],
            "groups": groups,
        }
        return result


class Suppressor(nn.Module):
    """Self-attention in which a query sees those with a better score, then a feed-forward block.

    There are no positions here. How far each head looks depends on how boxes lie to each other.
    Where nobody is better, ten learned tokens are looked at.
    """

    def __init__(self, d_model: int, n_heads: int, d_ffn: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.relation = MLP(RELATED, RELATED, n_heads, 2)
        self.token_key = nn.Parameter(torch.empty(_TOKENS, d_model))
        self.token_value = nn.Parameter(torch.empty(_TOKENS, d_model))
        # together, the tokens weigh as much as one query that is as good as any
        self.token_bias = nn.Parameter(torch.full((n_heads, _TOKENS), -math.log(_TOKENS)))
        self.norm1 = ExactLayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm2 = ExactLayerNorm(d_model)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name != "token_bias":
                nn.init.xavier_uniform_(parameter)  # tokens, too: equal ones would never part
        for linear in (self.in_proj, self.out_proj):  # as in attention of the decoder
            nn.init.zeros_(linear.bias)
        start_at_zero(self.relation)  # boxes do not matter then

    def forward(self, x: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
        """Shape: x [N,Q,C]; scores [N,Q,classes], logits; boxes [N,Q,4] cxcywh -> [N,Q,C]."""
        query, key, value = self.in_proj(x).chunk(3, dim=-1)
        token_key = self.in_proj(self.token_key).chunk(3, dim=-1)[1].expand(x.shape[0], -1, -1)
        token_value = self.in_proj(self.token_value).chunk(3, dim=-1)[2].expand(x.shape[0], -1, -1)
        query, key, value = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [N,H,...,C/H]
            for part in (
                query,
                torch.cat([key, token_key], dim=1),
                torch.cat([value, token_value], dim=1),
            )
        )
        bias = self.bias(scores, boxes).to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        x = self.norm1(x + attended.to(x.dtype))
        hidden = F.relu(self.linear1(x))
        output: Tensor = self.norm2(x + self.linear2(hidden).to(x.dtype))
        return output

    def bias(self, scores: Tensor, boxes: Tensor) -> Tensor:
        """Return what is added to logits of attention; -inf where a query must not look.

        Nothing is learned through scores and boxes. Shape: [N,H,Q,Q+tokens].
        """
        best = scores.detach().amax(-1)
        better = best[:, None, :] > best[:, :, None]  # [N,Q,Q]: the column's is better
        relation = symmetric_bias(self.relation, boxes).masked_fill(~better[:, None], -math.inf)
        tokens = self.token_bias[None, :, None].expand(*relation.shape[:3], -1)
        return torch.cat([relation, tokens.to(relation.dtype)], dim=-1)
