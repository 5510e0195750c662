"""Options to constructors, and the weights that a new model starts from."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from configs.schema import LossConfig, ModelConfig
from models.backbones import create_backbone
from models.criterion import LOSSES, SetCriterion
from models.decoder import DeformableDecoder, DeformableDecoderLayer
from models.deformable_detr import DeformableDETR
from models.encoders import ENCODERS, EncoderOptions
from models.heads import MLP, DetectionHeads
from models.layers import ExactLinear
from models.learned_positions import PositionEmbeddingLearned
from models.levels import Joiner, PositionEmbeddingSine
from models.matcher import HungarianMatcher
from models.necks import NECKS, NeckOptions
from models.recipes import RECIPES
from models.transformer import DeformableTransformer
from ops import MSDeformAttn
from util.errors import ConfigError

POSITION_ENCODINGS = {"sine": PositionEmbeddingSine, "learned": PositionEmbeddingLearned}
ALL_STAGES = 5


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    backbone_weights: str = "none",
    frozen_stages: int = 2,
    recipes: Mapping[str, Any] | None = None,
) -> DeformableDETR:
    """Build a detector with fresh weights, but for the backbone's.

    `recipes` maps the names of recipes to instances of their `Options`.

    Raises:
        ConfigError: the backbone, encoder, neck or a recipe is unknown.
        CheckpointError: its weights cannot be had or do not fit.
    """
    width, levels = config.hidden_dim, config.num_feature_levels
    backbone = create_backbone(
        config.backbone,
        single_level=levels == 1,
        dilation=config.dilation,
        weights=backbone_weights,
        frozen_stages=frozen_stages,
        train_norm=config.train_backbone_norm,
    )
    heads = build_heads(config, num_classes)
    position_encoding = POSITION_ENCODINGS[config.position_embedding](width // 2)
    transformer = build_transformer(config, heads)
    query_embed = None if config.two_stage else nn.Embedding(config.num_queries, width * 2)
    model = DeformableDETR(
        Joiner(backbone, position_encoding),
        build_input_proj(backbone.channels, width, levels),
        transformer,
        heads,
        query_embed=query_embed,
        neck=NECKS[config.neck](NeckOptions(width, levels)),
        aux_loss=config.aux_loss,
    )
    for name, options in (recipes or {}).items():  # last: no other weight depends on them
        model.recipes[name] = RECIPES[name](options, transformer, num_classes=num_classes)
    return model.to(memory_format=torch.channels_last)  # see Joiner.forward


def build_heads(config: ModelConfig, num_classes: int) -> DetectionHeads:
    """Build the heads of every decoder layer and, in a two-stage model, of the encoder.

    Every head that requires a gradient gets one: without `aux_loss`, the heads of refining layers
    before the last, whose boxes pass no gradient on, do not learn.
    """
    class_head = ExactLinear(config.hidden_dim, num_classes)
    # nearly all queries see background: scores that start at 0.01 keep the sum of their losses
    # from drowning the rest (RetinaNet, arXiv 1708.02002, Sec. 4.1)
    nn.init.constant_(class_head.bias, -math.log((1 - 0.01) / 0.01))
    box_head = MLP(config.hidden_dim, config.hidden_dim, 4, 3)
    for name in ("weight", "bias"):  # the first boxes are the references themselves
        nn.init.zeros_(box_head.get_parameter(f"layers.2.{name}"))
    count = config.dec_layers + int(config.two_stage)
    class_heads, box_heads = [class_head] * count, [box_head] * count  # shared by all layers
    if config.with_box_refine:
        class_heads = [copy.deepcopy(head) for head in class_heads]
        box_heads = [copy.deepcopy(head) for head in box_heads]
    if not config.two_stage:  # where no proposals set them, sizes start at 0.12, sigmoid(-2)
        nn.init.constant_(box_heads[0].get_parameter("layers.2.bias")[2:], -2.0)
    heads = DetectionHeads(class_heads, box_heads)
    if config.with_box_refine and not config.aux_loss:  # no loss reaches those of earlier layers
        for either in (heads.class_embed, heads.bbox_embed):
            either[: config.dec_layers - 1].requires_grad_(False)
    return heads


def build_transformer(config: ModelConfig, heads: DetectionHeads) -> DeformableTransformer:
    """Build the transformer around the heads, with the official initial weights.

    Deformable attention resets itself: offsets in one direction per head, and equal weights
    (Appendix A.4).
    """
    common: dict[str, Any] = {
        "d_model": config.hidden_dim,
        "d_ffn": config.dim_feedforward,
        "dropout": config.dropout,
        "n_levels": config.num_feature_levels,
        "n_heads": config.nheads,
    }
    encoder = ENCODERS[config.encoder](
        EncoderOptions(num_layers=config.enc_layers, n_points=config.enc_n_points, **common)
    )
    decoder = DeformableDecoder(
        [
            DeformableDecoderLayer(n_points=config.dec_n_points, **common)
            for _ in range(config.dec_layers)
        ],
        heads,
        with_box_refine=config.with_box_refine,
        two_stage=config.two_stage,
    )
    transformer = DeformableTransformer(
        encoder,
        decoder,
        d_model=config.hidden_dim,
        num_feature_levels=config.num_feature_levels,
        two_stage=config.two_stage,
        num_queries=config.num_queries,
    )
    initialised = ("decoder.bbox_embed", "decoder.class_embed")
    for name, parameter in transformer.named_parameters():
        if parameter.dim() > 1 and not name.startswith(initialised):
            nn.init.xavier_uniform_(parameter)
    for module in transformer.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()
    if not config.two_stage:
        nn.init.zeros_(transformer.reference_points.bias)
    nn.init.normal_(transformer.level_embed)
    return transformer


def build_input_proj(channels: tuple[int, ...], d_model: int, num_levels: int) -> nn.ModuleList:
    """Return 1x1 projections of backbone maps, then 3x3 stride-2 ones for extra levels.

    Group norm follows each: it does not depend on the size of the batch (Appendix A.2).
    """
    layers = [nn.Conv2d(c, d_model, kernel_size=1) for c in channels]
    layers += [
        nn.Conv2d(d_model if i else channels[-1], d_model, kernel_size=3, stride=2, padding=1)
        for i in range(num_levels - len(channels))
    ]
    for conv in layers:
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    groups = 32 if d_model % 32 == 0 else 8
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(groups, d_model)) for conv in layers)


def build_criterion(config: LossConfig) -> SetCriterion:
    """Build matcher and losses."""
    matcher = HungarianMatcher(
        cost_class=config.set_cost_class,
        cost_bbox=config.set_cost_bbox,
        cost_giou=config.set_cost_giou,
        focal_alpha=config.focal_alpha,
    )
    weights = {
        "loss_ce": config.cls_loss_coef,
        "loss_bbox": config.bbox_loss_coef,
        "loss_giou": config.giou_loss_coef,
    }
    for given in config.extra_losses:
        name, _, coefficient = given.partition("=")
        _, weights[name] = LOSSES[name]
        if coefficient:
            try:
                weights[name] = float(coefficient)
            except ValueError:
                raise ConfigError(
                    f"extra_losses: '{given}' has no number after '='. "
                    "Write NAME or NAME=COEFFICIENT."
                ) from None
    return SetCriterion(matcher, weights=weights, focal_alpha=config.focal_alpha)
