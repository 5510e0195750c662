"""The detector: backbone, projections, deformable transformer, heads (arXiv 2010.04159, Fig. 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.backbones import Joiner
from models.heads import DetectionHeads
from models.outputs import DetectorOutput, GroupOutput, objects_of_one_class
from models.queries import Proposals, QueryGroup
from models.recipes.base import Recipe
from models.transformer import DeformableTransformer, TransformerOutput
from util.batch import PaddedBatch, Target

# N batch, Q queries, S tokens, L feature levels, C width.


class DeformableDETR(nn.Module):
    """Deformable DETR. State-dict keys are those of the official implementation."""

    def __init__(
        self,
        backbone: Joiner,
        transformer: DeformableTransformer,
        heads: DetectionHeads,
        *,
        num_queries: int,
        num_feature_levels: int,
        aux_loss: bool = True,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        d_model = transformer.d_model
        self.aux_loss = aux_loss
        self.transformer = transformer
        self.class_embed = heads.class_embed
        self.bbox_embed = heads.bbox_embed
        self.query_embed = None
        if not transformer.two_stage:
            self.query_embed = nn.Embedding(num_queries, d_model * 2)
        self.input_proj = build_input_proj(backbone.channels, d_model, num_feature_levels)
        self.neck = neck or nn.Identity()
        self.backbone = backbone
        self.recipes = nn.ModuleDict()  # by name, what adds queries in training
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
        self, batch: PaddedBatch, targets: Sequence[Target] | None = None
    ) -> DetectorOutput:
        """Detect objects in a padded batch of normalised images.

        In training with `targets`, recipes add queries of their own to those that detect.
        """
        query_embed = None if self.query_embed is None else self.query_embed.weight
        output = self.transformer(
            *self.feature_levels(batch),
            query_embed,
            lambda memory, proposals: self._more_queries(memory, proposals, targets),
        )
        return self._outputs(output)

    def _more_queries(
        self, memory: Tensor, proposals: Proposals | None, targets: Sequence[Target] | None
    ) -> list[QueryGroup]:
        groups: list[QueryGroup] = []
        if self.training and targets is not None:
            for recipe in self.recipes.values():
                assert isinstance(recipe, Recipe)
                groups += recipe.queries(self.transformer, memory, proposals, targets)
        return groups

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

    def _outputs(self, output: TransformerOutput) -> DetectorOutput:
        """Sort what was decoded by groups; without `aux_loss` the last layer alone is kept."""
        kept = slice(None) if self.aux_loss else slice(-1, None)
        sizes = [group.content.shape[1] for group in output.groups]
        logits = torch.split(torch.stack(output.decoder.logits[kept]), sizes, dim=2)
        boxes = torch.split(torch.stack(output.decoder.boxes[kept]), sizes, dim=2)
        groups = [
            GroupOutput(g.name, g_logits, g_boxes, g.targets, g.matches, g.divisor)
            for g, g_logits, g_boxes in zip(output.groups, logits, boxes, strict=True)
        ]
        if (proposals := output.proposals) is not None:
            encoder = (proposals.logits[None], proposals.box_logits.sigmoid()[None])
            groups.append(GroupOutput("_enc", *encoder, targets=objects_of_one_class))
        result: DetectorOutput = {  # a literal, which compiles
            "pred_logits": output.decoder.logits[-1][:, : sizes[0]],
            "pred_boxes": output.decoder.boxes[-1][:, : sizes[0]],
            "groups": groups,
        }
        return result


def build_input_proj(channels: tuple[int, ...], d_model: int, num_levels: int) -> nn.ModuleList:
    """Return 1x1 projections of backbone maps, then 3x3 stride-2 ones for extra levels."""
    layers = [nn.Conv2d(c, d_model, kernel_size=1) for c in channels]
    source = channels[-1]
    for _ in range(num_levels - len(channels)):
        layers.append(nn.Conv2d(source, d_model, kernel_size=3, stride=2, padding=1))
        source = d_model
    for conv in layers:
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    groups = 32 if d_model % 32 == 0 else 8
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(groups, d_model)) for conv in layers)
