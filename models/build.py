"""Options to constructors."""

from typing import Any

import torch

from configs.schema import LossConfig, ModelConfig
from models.backbones import Joiner, create_backbone
from models.criterion import SetCriterion
from models.decoder import DeformableDecoder, DeformableDecoderLayer
from models.deformable_detr import DeformableDETR, DetectionHeads
from models.encoders.deformable import DeformableEncoder, DeformableEncoderLayer
from models.matcher import HungarianMatcher
from models.position_encoding import build_position_encoding
from models.transformer import DeformableTransformer

ALL_STAGES = 5


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    backbone_weights: str = "none",
    frozen_stages: int = 2,
) -> DeformableDETR:
    """Build a detector with fresh weights, but for the backbone's.

    Raises:
        ConfigError: the backbone is unknown.
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
    model = DeformableDETR(
        Joiner(backbone, position_encoding),
        build_transformer(config, heads),
        heads,
        num_queries=config.num_queries,
        num_feature_levels=config.num_feature_levels,
        aux_loss=config.aux_loss,
    )
    return model.to(memory_format=torch.channels_last)  # see Joiner.forward


def build_transformer(config: ModelConfig, heads: DetectionHeads) -> DeformableTransformer:
    """Build the transformer; a refining decoder holds the box heads too."""
    common: dict[str, Any] = {
        "d_ffn": config.dim_feedforward,
        "dropout": config.dropout,
        "n_levels": config.num_feature_levels,
        "n_heads": config.nheads,
    }
    encoder_layers = [
        DeformableEncoderLayer(config.hidden_dim, n_points=config.enc_n_points, **common)
        for _ in range(config.enc_layers)
    ]
    decoder_layers = [
        DeformableDecoderLayer(config.hidden_dim, n_points=config.dec_n_points, **common)
        for _ in range(config.dec_layers)
    ]
    return DeformableTransformer(
        DeformableEncoder(encoder_layers),
        DeformableDecoder(
            decoder_layers,
            bbox_embed=heads.bbox_embed if config.with_box_refine else None,
            class_embed=heads.class_embed if config.two_stage else None,
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
    return SetCriterion(matcher, weights=weights, focal_alpha=config.focal_alpha)
