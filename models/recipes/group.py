"""Groups of queries, each of which finds every object once (Group DETR, arXiv 2207.13085).

In training, several groups stand beside the queries that detect. Each is matched one to one with
the objects, by itself, and none sees another: heads and decoder learn from as many queries for an
object as there are groups. A two-stage encoder has heads of its own to choose each group.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from configs.options import option
from models.one_to_many import FurtherHeads
from models.proposals import Proposals, objects_of_one_class
from models.queries import GroupOutput, Learning, QueryGroup
from models.recipes import RECIPES, Recipe, RecipeOptions
from models.transformer import DeformableTransformer
from models.two_stage import TwoStageTransformer

# N batch, Q queries of a group, P groups beside the one that detects, C width.


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Options of Group DETR, under their official names."""

    group_detr: int = option(
        11, "groups of queries in training, the one that detects included", low=1, most=100
    )

    @property
    def active(self) -> bool:
        """Return whether there is a group beside the one that detects."""
        return self.group_detr > 1


@RECIPES.register("group")
class Group(Recipe):
    """The further groups, side by side as one, which attention and matching take apart."""

    options_class = Options

    def __init__(
        self, options: Options, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__(options, transformer, num_classes=num_classes)
        self.parts = parts = options.group_detr - 1
        # losses are the mean over all groups
        self.share = 1 / options.group_detr
        self.learning = Learning(parts=parts, divisor=parts, weight=parts * self.share)
        self.query_embed: nn.Embedding | None = None
        if transformer.learned_width:
            count = parts * transformer.num_queries
            self.query_embed = nn.Embedding(count, transformer.learned_width)
        self.encoder_heads = nn.ModuleList(
            FurtherHeads(transformer.d_model, own_projection=True)
            for _ in range(parts * transformer.two_stage)
        )

    def regroup(
        self,
        transformer: DeformableTransformer,
        groups: list[QueryGroup],
        proposals: Proposals | None,
        *,
        learning: bool,
    ) -> list[QueryGroup]:
        """Add the groups, and give the one that detects its share."""
        if not learning:
            return groups
        detecting, *others = groups
        if proposals is None:
            assert self.query_embed is not None
            further = transformer.from_embedding(
                "_groups", self.query_embed.weight, len(detecting.content), self.learning
            )
        else:
            further = self._proposed(transformer, proposals)
        encoder = detecting.encoder
        if encoder is not None:
            shared = replace(encoder.learning, weight=encoder.learning.weight * self.share)
            encoder = replace(encoder, learning=shared)
        shared = replace(detecting.learning, weight=detecting.learning.weight * self.share)
        detecting = replace(detecting, learning=shared, encoder=encoder)
        return [detecting, *others, replace(further, parts=self.parts)]

    def _proposed(self, transformer: DeformableTransformer, proposals: Proposals) -> QueryGroup:
        """Return queries that start from each group's own best proposals, which learn as well."""
        assert isinstance(transformer, TwoStageTransformer)
        count = transformer.num_queries
        chosen = [_best(heads(proposals, transformer), count) for heads in self.encoder_heads]
        logits, boxes = (torch.cat(part, dim=1) for part in zip(*chosen, strict=True))
        contents: Tensor | None = None
        if self.query_embed is not None:  # an image may have fewer tokens than there are queries
            embedded = self.query_embed.weight.reshape(self.parts, count, -1)
            contents = embedded[:, : boxes.shape[1] // self.parts].flatten(0, 1)
        group = transformer.from_boxes("_groups", boxes.detach(), contents, self.learning)
        encoder_learning = replace(self.learning, targets=objects_of_one_class)
        encoder = GroupOutput("_groups_enc", logits[None], boxes[None], encoder_learning)
        return replace(group, encoder=encoder)


def _best(proposals: Proposals, count: int) -> tuple[Tensor, Tensor]:
    """Return scores and boxes of the best proposals. Shape: [N,count,1] and [N,count,4]."""
    ranked = proposals.ranked(count)[..., None]
    boxes = proposals.box_logits.gather(1, ranked.expand(-1, -1, 4)).sigmoid()
    return proposals.logits.gather(1, ranked), boxes
