"""Options to constructors."""

from collections.abc import Mapping
from typing import Any

import torch

from configs.schema import LossConfig, ModelConfig
from models.backbones import Joiner, create_backbone
from models.criterion import SetCriterion
from models.decoder import DeformableDecoder, DeformableDecoderLayer
from models.deformable_detr import DeformableDETR
from models.encoders import ENCODERS, EncoderOptions
from models.heads import DetectionHeads
from models.losses import LOSSES
from models.matcher import HungarianMatcher
from models.necks import NECKS, NeckOptions
from models.position_encoding import build_position_encoding
from models.recipes import RECIPES
from models.transformer import DeformableTransformer
from util.errors import ConfigError

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
    backbone = create_backbone(
        config.backbone,
        single_level=config.num_feature_levels == 1,
        dilation=config.dilation,
        weights=backbone_weights,
        frozen_stages=frozen_stages,
        train_norm=config.train_backbone_norm,
    )
    heads = DetectionHeads(
        config.hidden_dim,
        num_classes,
        num_layers=config.dec_layers,
        with_box_refine=config.with_box_refine,
        two_stage=config.two_stage,
        aux_loss=config.aux_loss,
    )
    position_encoding = build_position_encoding(config.position_embedding, config.hidden_dim)
    transformer = build_transformer(config, heads)
    model = DeformableDETR(
        Joiner(backbone, position_encoding),
        transformer,
        heads,
        num_queries=config.num_queries,
        num_feature_levels=config.num_feature_levels,
        aux_loss=config.aux_loss,
        neck=NECKS[config.neck](NeckOptions(config.hidden_dim, config.num_feature_levels)),
    )
    for name, options in (recipes or {}).items():  # last: no other weight depends on them
        model.recipes[name] = RECIPES[name](options, transformer, num_classes=num_classes)
    return model.to(memory_format=torch.channels_last)  # see Joiner.forward


def build_transformer(config: ModelConfig, heads: DetectionHeads) -> DeformableTransformer:
    """Build the transformer around the heads."""
    common: dict[str, Any] = {
        "d_ffn": config.dim_feedforward,
        "dropout": config.dropout,
        "n_levels": config.num_feature_levels,
        "n_heads": config.nheads,
    }
    encoder = ENCODERS[config.encoder](
        EncoderOptions(
            d_model=config.hidden_dim,
            num_layers=config.enc_layers,
            n_points=config.enc_n_points,
            **common,
        )
    )
    decoder_layers = [
        DeformableDecoderLayer(config.hidden_dim, n_points=config.dec_n_points, **common)
        for _ in range(config.dec_layers)
    ]
    return DeformableTransformer(
        encoder,
        DeformableDecoder(
            decoder_layers,
            heads,
            with_box_refine=config.with_box_refine,
            two_stage=config.two_stage,
        ),
        d_model=config.hidden_dim,
        num_feature_levels=config.num_feature_levels,
        two_stage=config.two_stage,
        num_queries=config.num_queries,
    )


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
        weights[name] = LOSSES[name].coefficient if not coefficient else _number(given, coefficient)
    return SetCriterion(matcher, weights=weights, focal_alpha=config.focal_alpha)


def _number(given: str, coefficient: str) -> float:
    try:
        return float(coefficient)
    except ValueError:
        raise ConfigError(
            f"extra_losses: '{given}' has no number after '='. Write NAME or NAME=COEFFICIENT."
        ) from None
