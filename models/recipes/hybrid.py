"""Hybrid matching: further queries, of which several learn each object (H-DETR, arXiv 2207.13080).

One-to-one matching gives few queries a box to learn. A second group of queries, in training alone,
is matched with every object `k_one2many` times; decoder and heads, which both groups share, learn
from all of them (Sec. 3.2, hybrid branch scheme).
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from configs.options import option
from models.matcher import PaddedTargets
from models.one_to_many import FurtherHeads
from models.proposals import Proposals, objects_of_one_class
from models.queries import Learning, QueryGroup
from models.recipes import RECIPES, Recipe, RecipeOptions
from models.transformer import DeformableTransformer
from models.two_stage import TwoStageTransformer


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Options of hybrid matching, under their official names."""

    num_queries_one2many: int = option(1500, "additional queries in training", low=1, most=100_000)
    k_one2many: int = option(6, "how many of these queries learn each object", low=1, most=1000)
    lambda_one2many: float = option(1.0, "weight of the losses of these queries", above=0)
    hybrid_proposals: bool = option(
        False,
        "two_stage: these queries start from proposals of heads of their own, as in "
        "Relation-DETR, else from those that rank next",
        rare=True,
    )


@RECIPES.register("hybrid")
class Hybrid(Recipe):
    """The proposals that rank next or, in a model of one stage, learned queries of its own.

    With `hybrid_proposals`, heads of its own propose, and learn from as many copies of an object.
    """

    options_class = Options

    def __init__(
        self, options: Options, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__(options, transformer, num_classes=num_classes)
        self.num_queries, self.repeats = options.num_queries_one2many, options.k_one2many
        # the targets are repeated, and with them the number of boxes that losses are divided by
        divisor = self.repeats / options.lambda_one2many
        self.learning = Learning(targets=self.repeated, divisor=divisor)
        self.query_embed: nn.Embedding | None = None
        if transformer.learned_width:
            self.query_embed = nn.Embedding(self.num_queries, transformer.learned_width)
        self.encoder_heads: FurtherHeads | None = None
        if options.hybrid_proposals and isinstance(transformer, TwoStageTransformer):
            scores = num_classes if transformer.class_proposals else 1
            self.encoder_heads = FurtherHeads(transformer.d_model, scores=scores)

    def queries(
        self,
        transformer: DeformableTransformer,
        memory: Tensor,
        proposals: Proposals | None,
        prepared: None,
    ) -> list[QueryGroup]:
        """Return the one group, which may be empty where an image has few tokens."""
        learned = None if self.query_embed is None else self.query_embed.weight
        if proposals is None:
            assert learned is not None
            count = len(memory)
            return [transformer.from_embedding("_one2many", learned, count, self.learning)]
        assert isinstance(transformer, TwoStageTransformer)
        if self.encoder_heads is not None:
            return [self._proposed(self.encoder_heads(proposals, transformer), transformer)]
        first = transformer.num_queries
        boxes = proposals.best(first, first + self.num_queries)
        return [transformer.from_boxes("_one2many", boxes, learned, self.learning)]

    def _proposed(self, found: Proposals, transformer: TwoStageTransformer) -> QueryGroup:
        """Return queries that start from proposals, which learn as well."""
        tell_classes = found.num_learning is not None
        if tell_classes:
            found = replace(found, num_learning=self.num_queries)
        targets = self.repeated if tell_classes else self.repeated_objects
        encoder = found.output("_one2many_enc")
        encoder = replace(encoder, learning=replace(self.learning, targets=targets))
        learned = None if self.query_embed is None else self.query_embed.weight
        boxes = found.best(0, self.num_queries)
        group = transformer.from_boxes("_one2many", boxes, learned, self.learning)
        return replace(group, encoder=encoder)

    def repeated_objects(self, targets: PaddedTargets) -> PaddedTargets:
        """Return every target `repeats` times with label 0, which stands for any object."""
        return self.repeated(objects_of_one_class(targets))

    def repeated(self, targets: PaddedTargets) -> PaddedTargets:
        """Return every target `repeats` times; as before, padding comes last in each row."""
        return PaddedTargets(
            targets.labels.repeat_interleave(self.repeats, dim=1),
            targets.boxes.repeat_interleave(self.repeats, dim=1),
            [count * self.repeats for count in targets.counts],
        )
