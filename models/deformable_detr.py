"""The detector: backbone, projections, deformable transformer, heads (arXiv 2010.04159, Fig. 1)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.heads import DetectionHeads
from models.levels import Joiner
from models.proposals import Proposals
from models.queries import DetectorOutput, GroupOutput, QueryGroup
from models.recipes import Recipe
from models.transformer import DeformableTransformer
from util.batch import EffectiveBatch, PaddedBatch, Target

# N batch, Q queries, S tokens, L feature levels, C width.


class DeformableDETR(nn.Module):
    """Deformable DETR. State-dict keys are those of the official implementation.

    `query_embed` holds the learned queries: their positions and contents, of width 2 C, or the
    contents alone; None for those of a two-stage model.
    `input_proj` projects the backbone's maps, then makes further levels of the last one. A neck
    may mix the levels. Without `aux_loss`, the last decoder layer alone is supervised.
    """

    _compiled: Callable[..., DetectorOutput] | None = None

    def __init__(
        self,
        backbone: Joiner,
        input_proj: nn.ModuleList,
        transformer: DeformableTransformer,
        heads: DetectionHeads,
        *,
        query_embed: nn.Embedding | None = None,
        neck: nn.Module | None = None,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        self.aux_loss = aux_loss
        self.num_queries = transformer.num_queries
        self.transformer = transformer
        self.class_embed = heads.class_embed
        self.bbox_embed = heads.bbox_embed
        self.query_embed = query_embed
        self.input_proj = input_proj
        self.neck = neck or nn.Identity()
        self.backbone = backbone
        self.scores_no_object = hasattr(heads.class_embed[0], "no_object")
        self.recipes = nn.ModuleDict()  # by name
        self._in_evaluation: list[nn.Module] = []

    def stay_in_evaluation(self, parts: Sequence[nn.Module]) -> None:
        """Keep parts of the model in evaluation mode from now on, whatever `train` says."""
        self._in_evaluation = list(parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> "DeformableDETR":
        """Set training mode; dropout and norms of frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._in_evaluation:
            part.eval()
        return self

    def forward(
        self,
        batch: PaddedBatch,
        targets: Sequence[Target] | None = None,
        whole: EffectiveBatch | None = None,
    ) -> DetectorOutput:
        """Detect objects in a padded batch of normalised images.

        In training with `targets`, recipes add queries of their own to those that detect. `whole`
        describes the effective batch that the batch is part of, by default all of it.
        """
        prepared: list[Any] = []  # what each recipe knows of the targets
        if self.training and targets is not None:
            whole = EffectiveBatch.of(targets) if whole is None else whole
            fixed_sizes = self._compiled is not None
            prepared = [
                recipe.prepare(targets, whole, fixed_sizes=fixed_sizes)
                for recipe in self.chosen_recipes()
            ]
        return (self._compiled or self._detect)(batch, prepared)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward pass, all but what recipes prepare; see `torch.compile`."""
        self._compiled = torch.compile(self._detect, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy, which is not compiled."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name != "_compiled"}

    def _detect(self, batch: PaddedBatch, prepared: list[Any]) -> DetectorOutput:
        query_embed = None if self.query_embed is None else self.query_embed.weight

        # as text, because the compiler of PyTorch 2.6 cannot evaluate a union
        def more_queries(memory: Tensor, proposals: "Proposals | None") -> list[QueryGroup]:
            groups: list[QueryGroup] = []
            if prepared:
                for recipe, own in zip(self.chosen_recipes(), prepared, strict=True):
                    groups += recipe.queries(self.transformer, memory, proposals, own)
            return groups

        def regroup(groups: list[QueryGroup], proposals: "Proposals | None") -> list[QueryGroup]:
            learning = bool(prepared)
            for recipe in self.chosen_recipes():
                groups = recipe.regroup(self.transformer, groups, proposals, learning=learning)
            return groups

        features, masks, pos = self.feature_levels(batch)
        output = self.transformer(features, masks, pos, query_embed, more_queries, regroup)
        kept = slice(None) if self.aux_loss else slice(-1, None)
        sizes = [group.content.shape[1] for group in output.groups]
        logits = torch.split(torch.stack(output.decoder.logits[kept]), sizes, dim=2)
        boxes = torch.split(torch.stack(output.decoder.boxes[kept]), sizes, dim=2)
        groups = [
            GroupOutput(g.name, g_logits, g_boxes, g.learning)
            for g, g_logits, g_boxes in zip(output.groups, logits, boxes, strict=True)
        ]
        groups += [g.encoder for g in output.groups if g.encoder is not None]
        classes = slice(None, -1 if self.scores_no_object else None)
        result: DetectorOutput = {  # a literal, which compiles
            "pred_logits": output.decoder.logits[-1][:, : sizes[0], classes],
            "pred_boxes": output.decoder.boxes[-1][:, : sizes[0]],
            "groups": groups,
        }
        for recipe in self.chosen_recipes():
            result = recipe.output(result, output)
        return result

    def chosen_recipes(self) -> list[Recipe]:
        """Return the recipes, in the order in which they are applied."""
        return [recipe for recipe in self.recipes.values() if isinstance(recipe, Recipe)]

    def feature_levels(self, batch: PaddedBatch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return projected features, padding masks and encodings of every level, finest first."""
        maps, masks, pos = self.backbone(batch)
        projections = self.input_proj[: len(maps)]
        features = [proj(m) for proj, m in zip(projections, maps, strict=True)]
        source = maps[-1]  # the first extra level comes from the raw last map
        for projection in self.input_proj[len(maps) :]:
            source = projection(source)
            mask, encoding = self.backbone.encode_position(batch.mask, source)
            features.append(source)
            masks.append(mask)
            pos.append(encoding)
        return self.neck(features), masks, pos
