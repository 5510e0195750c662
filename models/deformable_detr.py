"""The detector: backbone, projections, deformable transformer, heads (arXiv 2010.04159, Fig. 1)."""

import copy
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from models.backbones import Joiner
from models.decoder import apply_delta
from models.layers import MLP, ExactLinear, focal_prior_bias
from models.transformer import DeformableTransformer, TransformerOutput
from util.batch import PaddedBatch, Target

# N batch, Q queries, S tokens, L feature levels, C width.


class DetectorOutput(TypedDict, total=False):
    """Predictions. Boxes are normalised cxcywh relative to the unpadded image.

    `pred_logits` [N,Q,classes] and `pred_boxes` [N,Q,4] are the last decoder layer's;
    `layer_logits` and `layer_boxes` hold every supervised layer, [layers,N,Q,...], the last one
    last; `enc_logits` [N,S,classes] and `enc_boxes` [N,S,4] come from a two-stage encoder.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    layer_logits: Tensor
    layer_boxes: Tensor
    enc_logits: Tensor
    enc_boxes: Tensor


class DetectionHeads(nn.Module):
    """Classification and box heads of every decoder layer, and of the encoder if two-stage.

    Every one that requires a gradient gets one: without `aux_loss`, the heads of refining layers
    before the last, whose boxes pass no gradient on, do not learn.
    """

    def __init__(
        self,
        d_model: int,
        num_classes: int,
        *,
        num_layers: int,
        with_box_refine: bool,
        two_stage: bool,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        count = num_layers + int(two_stage)
        class_head = ExactLinear(d_model, num_classes)
        nn.init.constant_(class_head.bias, focal_prior_bias())
        box_head = MLP(d_model, d_model, 4, 3)
        last = box_head.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if with_box_refine:
            class_heads = [copy.deepcopy(class_head) for _ in range(count)]
            box_heads = [copy.deepcopy(box_head) for _ in range(count)]
        else:  # without refinement all layers share one head
            class_heads, box_heads = [class_head] * count, [box_head] * count
        if not two_stage:  # sizes start small, where proposals do not set them
            first = box_heads[0].layers[-1]
            assert isinstance(first, nn.Linear)
            nn.init.constant_(first.bias[2:], -2.0)
        self.class_embed = nn.ModuleList(class_heads)
        self.bbox_embed = nn.ModuleList(box_heads)
        if with_box_refine and not aux_loss:  # no loss reaches the heads of earlier layers
            for heads in (self.class_embed, self.bbox_embed):
                heads[: num_layers - 1].requires_grad_(False)


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
        self.backbone = backbone
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

        In training, `targets` are for what learns from more queries than those that detect.
        """
        features, masks, pos = self.feature_levels(batch)
        query_embed = None if self.query_embed is None else self.query_embed.weight
        return self.predict(self.transformer(features, masks, pos, query_embed))

    def feature_levels(self, batch: PaddedBatch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return projected features, padding masks and encodings of every level, finest first."""
        maps, masks, pos = self.backbone(batch)
        features = [proj(m) for proj, m in zip(self.input_proj, maps, strict=False)]
        source = maps[-1]  # the first extra level comes from the raw last map
        for projection in self.input_proj[len(maps) :]:
            source = projection(source)
            mask, encoding = self.backbone.encode_position(batch.mask, source)
            features.append(source)
            masks.append(mask)
            pos.append(encoding)
        return features, masks, pos

    def predict(self, output: TransformerOutput) -> DetectorOutput:
        """Apply the heads to every decoder layer."""
        decoded = output.decoder
        logits, boxes = [], []
        for index, (hidden, reference) in enumerate(
            zip(decoded.hidden, decoded.references, strict=True)
        ):
            delta = decoded.deltas[index] if decoded.deltas else self.bbox_embed[index](hidden)
            logits.append(self.class_embed[index](hidden))
            boxes.append(apply_delta(delta, reference))
        kept = slice(None) if self.aux_loss else slice(-1, None)
        result: DetectorOutput = {  # a literal, which compiles
            "pred_logits": logits[-1],
            "pred_boxes": boxes[-1],
            "layer_logits": torch.stack(logits[kept]),
            "layer_boxes": torch.stack(boxes[kept]),
        }
        if output.encoder_logits is not None and output.encoder_boxes is not None:
            result["enc_logits"] = output.encoder_logits
            result["enc_boxes"] = output.encoder_boxes
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
