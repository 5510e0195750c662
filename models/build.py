"""Options to constructors, the weights that a new model starts from, and what is set on it."""

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from configs.schema import LossConfig, ModelConfig
from models.backbones import Backbone, create_backbone
from models.contrastive import ContrastiveHead
from models.criterion import SetCriterion
from models.decoder import DeformableDecoder, DeformableDecoderLayer
from models.deformable_detr import DeformableDETR
from models.detr import DenseDecoderLayer, DetrTransformer
from models.dino_decoder import DinoDecoder
from models.encoders import ENCODERS, Encoder, EncoderOptions
from models.encoders.attention import DEFORMABLE, ENHANCER, EncoderAttention
from models.heads import MLP, DetectionHeads
from models.initial_values import start_at_prior, start_at_zero
from models.layers import ExactLinear, GroupNorm
from models.learned_positions import PositionEmbeddingLearned
from models.levels import Joiner, PositionEmbeddingSine
from models.losses import CLASS_LOSSES, CLASSIFICATION, LOSSES
from models.match_costs import HighOrderMatcher, PositionModulatedMatcher, ProbabilityMatcher
from models.matcher import HungarianMatcher
from models.necks import NECKS, NeckOptions, RawNeck
from models.prime_samples import PrimeSampleCriterion
from models.recipes import RECIPES
from models.relations import RelationBias, SymmetricRelationBias
from models.softmax import SoftmaxCriterion, SoftmaxHead
from models.token_decoder import TokenDecoderLayer
from models.token_scores import TokenScores
from models.transformer import DeformableTransformer
from models.two_stage import TwoStageTransformer
from models.union_set import UnionSetCriterion
from ops import MSDeformAttn
from util.errors import ConfigError, nearest_hint

ALL_STAGES = 5
_SHAPES = 512  # sizes of batches, once for training and once for evaluation; PyTorch's limit is 8


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    backbone_weights: str = "none",
    frozen_stages: int = 2,
    recipes: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> DeformableDETR:
    """Build a detector with fresh weights, but for the backbone's.

    `recipes` maps the names of recipes to instances of their `Options`. A `backbone` that is given
    takes the place of the one that options name.

    Raises:
        ConfigError: the backbone, encoder, neck or a recipe is unknown.
        CheckpointError: its weights cannot be had or do not fit.
    """
    width, levels = config.hidden_dim, config.num_feature_levels
    backbone = backbone or create_backbone(
        config.backbone,
        single_level=levels == 1,
        dilation=config.dilation,
        weights=backbone_weights,
        frozen_stages=frozen_stages,
        train_norm=config.train_backbone_norm,
        drop_path=config.drop_path,
        dat_grid=config.dat_grid,
        dat_stride=config.dat_stride,
        dcn=config.dcn,
        dcn_stages=config.dcn_stages,
    )
    heads = build_heads(config, num_classes)
    position_encoding = build_position_encoding(config)
    transformer = build_transformer(config, heads, num_classes=num_classes)
    learned = transformer.learned_width
    query_embed = nn.Embedding(config.num_queries, learned) if learned else None
    neck = NECKS[config.neck](NeckOptions(width, levels, backbone.channels, config.neck_width))
    input_proj = (
        neck.input_proj()
        if isinstance(neck, RawNeck)
        else build_input_proj(backbone.channels, width, levels, norm=config.input_norm == "group")
    )
    model = DeformableDETR(
        Joiner(backbone, position_encoding),
        input_proj,
        transformer,
        heads,
        query_embed=query_embed,
        neck=neck,
        aux_loss=config.aux_loss,
    )
    for name, options in (recipes or {}).items():  # last: no other weight depends on them
        model.recipes[name] = RECIPES[name](options, transformer, num_classes=num_classes)
    if config.encoder_updates == "sparse":
        model.recipes["token_scores"] = TokenScores(transformer)
    return model.to(memory_format=torch.channels_last)  # see Joiner.forward


def build_position_encoding(config: ModelConfig) -> nn.Module:
    """Build the positional encoding, which distinguishes the tokens of a level."""
    if config.position_embedding == "learned":
        return PositionEmbeddingLearned(config.hidden_dim // 2)
    return PositionEmbeddingSine(
        config.hidden_dim // 2,
        temperature=config.position_temperature,
        offset=config.position_offset,
    )


def build_heads(config: ModelConfig, num_classes: int) -> DetectionHeads:
    """Build the heads of every decoder layer and, in a two-stage model, of the encoder.

    Every head that requires a gradient gets one: without `aux_loss`, the heads of refining layers
    before the last, whose boxes pass no gradient on, do not learn. With `look_forward_twice`, those
    of the last but one pass one on.
    """
    has_tokens = config.encoder_attn == ENHANCER
    if config.scores == "softmax":
        class_head: nn.Module = SoftmaxHead(config.hidden_dim, num_classes)
    else:
        class_head = build_class_head(config.hidden_dim, num_classes, contrastive=has_tokens)
    box_head = MLP(config.hidden_dim, config.hidden_dim, 4, 3)
    if config.decoder_attn == "deformable":  # the first boxes are the references themselves
        start_at_zero(box_head)
    count = config.dec_layers + int(config.two_stage)
    class_heads, box_heads = [class_head] * count, [box_head] * count  # shared by all layers
    if config.shared_heads:  # but the encoder has its own
        class_heads[config.dec_layers :] = map(copy.deepcopy, class_heads[config.dec_layers :])
        box_heads[config.dec_layers :] = map(copy.deepcopy, box_heads[config.dec_layers :])
    elif config.with_box_refine:
        class_heads = [copy.deepcopy(head) for head in class_heads]
        box_heads = [copy.deepcopy(head) for head in box_heads]
    if has_tokens and config.two_stage and not config.class_proposals:
        # its first score stands for an object of any class
        class_heads[-1] = build_class_head(config.hidden_dim, num_classes, contrastive=False)
    if not config.two_stage and config.decoder_attn == "deformable":
        # where no proposals set them, sizes start at 0.12, sigmoid(-2)
        nn.init.constant_(box_heads[0].get_parameter("layers.2.bias")[2:], -2.0)
    heads = DetectionHeads(class_heads, box_heads)
    distinct = config.with_box_refine and not config.shared_heads
    if distinct and not config.aux_loss:  # no loss reaches those of earlier layers
        last = config.dec_layers - 1
        heads.class_embed[:last].requires_grad_(False)
        heads.bbox_embed[: max(last - config.look_forward_twice, 0)].requires_grad_(False)
    return heads


def build_class_head(d_model: int, num_classes: int, *, contrastive: bool) -> nn.Module:
    """Build a linear class head, or one that compares with class tokens."""
    made = ContrastiveHead if contrastive else ExactLinear
    head = made(d_model, num_classes)
    start_at_prior(head.bias)
    return head


def build_transformer(
    config: ModelConfig, heads: DetectionHeads, *, num_classes: int
) -> DeformableTransformer:
    """Build the transformer around the heads, with the official initial weights.

    Attention resets itself; deformable attention to offsets in one direction per head, and equal
    weights (Appendix A.4).
    """
    encoder = build_encoder(config, num_classes)
    shared: dict[str, Any] = {
        "d_model": config.hidden_dim,
        "num_feature_levels": config.num_feature_levels,
        "num_queries": config.num_queries,
    }
    transformer: DeformableTransformer
    if config.two_stage:
        transformer = TwoStageTransformer(
            encoder,
            build_decoder(config, heads),
            mixed_query_selection=config.mixed_query_selection,
            class_proposals=config.class_proposals,
            **shared,
        )
    else:
        made = DetrTransformer if config.decoder_attn == "dense" else DeformableTransformer
        transformer = made(encoder, build_decoder(config, heads), **shared)
    initialised = ("decoder.bbox_embed", "decoder.class_embed")
    for name, parameter in transformer.named_parameters():
        if parameter.dim() > 1 and not name.startswith(initialised):
            nn.init.xavier_uniform_(parameter)
    for module in transformer.modules():
        if isinstance(module, (MSDeformAttn, EncoderAttention, SymmetricRelationBias)):
            module.reset_parameters()
    encoder.reset_parameters()
    if transformer.queries_have_points:
        nn.init.zeros_(transformer.reference_points.bias)
    if transformer.level_embed.requires_grad:
        nn.init.normal_(transformer.level_embed)
    else:
        nn.init.zeros_(transformer.level_embed)
    return transformer


def build_encoder(config: ModelConfig, num_classes: int) -> Encoder:
    """Build the encoder that the options name."""
    kind = {DEFORMABLE: config.encoder, ENHANCER: ENHANCER}.get(config.encoder_attn, "mixed")
    options = EncoderOptions(
        num_layers=config.enc_layers,
        n_points=config.enc_n_points,
        fusion=config.enc_fusion,
        updates=config.encoder_updates,
        lite_levels=config.coarse_levels,
        lite_expansion=config.lite_expansion,
        rho=config.rho,
        attention=config.encoder_attn,
        dat_stride=config.dat_stride,
        num_classes=num_classes if config.encoder_attn == ENHANCER else 0,
        **_sizes_of_layers(config),
    )
    return ENCODERS[kind](options)


def _sizes_of_layers(config: ModelConfig) -> dict[str, Any]:
    """Return what layers of encoder and decoder have in common."""
    return {
        "d_model": config.hidden_dim,
        "d_ffn": config.dim_feedforward,
        "dropout": config.dropout,
        "n_levels": config.num_feature_levels,
        "n_heads": config.nheads,
    }


def build_decoder(config: ModelConfig, heads: DetectionHeads) -> DeformableDecoder:
    """Build the paper's decoder, or the one of later papers where something of it is asked for."""
    layer = DenseDecoderLayer if config.decoder_attn == "dense" else DeformableDecoderLayer
    if config.decoder_tokens:
        layer = TokenDecoderLayer
    layers: list[DeformableDecoderLayer] = [
        layer(n_points=config.dec_n_points, **_sizes_of_layers(config))
        for _ in range(config.dec_layers)
    ]
    refining: dict[str, Any] = {
        "with_box_refine": config.with_box_refine,
        "two_stage": config.two_stage,
        "refine_eps": config.refine_eps,
    }
    related = config.relation != "none"
    relation = SymmetricRelationBias if config.relation == "mds" else RelationBias
    fixed = config.query_position == "fixed"
    if fixed and not (config.look_forward_twice or config.decoder_norm or related):
        return DeformableDecoder(layers, heads, **refining)
    return DinoDecoder(
        layers,
        heads,
        look_forward_twice=config.look_forward_twice,
        query_position=config.query_position,
        norm=config.decoder_norm,
        relation=relation(config.nheads) if related else None,
        **refining,
    )


def build_input_proj(
    channels: tuple[int, ...], d_model: int, num_levels: int, *, norm: bool
) -> nn.ModuleList:
    """Return 1x1 projections of backbone maps, then 3x3 stride-2 ones for extra levels.

    With `norm`, group norm follows each: it does not depend on the size of the batch (Appendix
    A.2).
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
    if not norm:
        return nn.ModuleList(nn.Sequential(conv) for conv in layers)
    groups = 32 if d_model % 32 == 0 else 8
    return nn.ModuleList(nn.Sequential(conv, GroupNorm(groups, d_model)) for conv in layers)


def build_criterion(config: LossConfig) -> SetCriterion:
    """Build matcher and losses."""
    matchers: dict[str, Callable[..., HungarianMatcher]] = {
        "focal": HungarianMatcher,
        "position_modulated": PositionModulatedMatcher,
        "high_order": partial(HighOrderMatcher, high_order_from=config.high_order_from),
        "probability": ProbabilityMatcher,
    }
    matcher = matchers[config.match_cost](
        cost_class=config.set_cost_class,
        cost_bbox=config.set_cost_bbox,
        cost_giou=config.set_cost_giou,
        focal_alpha=config.focal_alpha,
    )
    coefficient = config.cls_loss_coef
    if coefficient is None:
        coefficient = CLASS_LOSSES[config.cls_loss].coefficient
    weights: dict[str, float] = {
        CLASSIFICATION: coefficient,
        "loss_bbox": config.bbox_loss_coef,
        "loss_giou": config.giou_loss_coef,
    }
    for given in config.extra_losses:
        name, _, factor = given.partition("=")
        weights[name] = LOSSES[name].coefficient
        if factor:
            try:
                weights[name] = float(factor)
            except ValueError:
                raise ConfigError(
                    f"extra_losses: '{given}' has no number after '='. "
                    "Write NAME or NAME=COEFFICIENT."
                ) from None
    kind: Callable[..., SetCriterion] = UnionSetCriterion if config.union_set else SetCriterion
    if config.cls_loss == "softmax":
        kind = partial(SoftmaxCriterion, eos_coef=config.eos_coef)
    if config.prime_samples > 1:
        kind = partial(PrimeSampleCriterion, samples=config.prime_samples, tau=config.prime_tau)
    return kind(matcher, weights=weights, cls_loss=config.cls_loss, focal_alpha=config.focal_alpha)


def freeze(model: DeformableDETR, part: str, *, fresh: Collection[str] = ()) -> None:
    """Freeze a part of the model: no gradients, and evaluation mode, thus no dropout.

    `part`: "none", "backbone", "encoder" (all that comes before the decoder) or "all_but_heads"
    (all that comes before the heads, the queries of recipes too). As nothing that learns comes
    before what is frozen, autograd records nothing of it. `fresh`: names of the parameters that
    have random values.

    Raises:
        ConfigError: one of these would stay random.
    """
    before_decoder = [model.backbone, model.input_proj, model.neck]
    queries = [] if model.query_embed is None else [model.query_embed]
    parts: list[nn.Module] = {
        "none": [],
        "backbone": [model.backbone[0]],
        "encoder": [*before_decoder, model.transformer.encoder],
        "all_but_heads": [*before_decoder, *queries, model.transformer, model.recipes],
    }[part]
    further = [head for recipe in model.chosen_recipes() for head in recipe.detecting_heads()]
    # a refining decoder holds the box heads too
    heads = {id(p) for m in (model.class_embed, model.bbox_embed, *further) for p in m.parameters()}
    frozen = {id(p) for module in parts for p in module.parameters()} - heads
    if part == "encoder":
        frozen.add(id(model.transformer.level_embed))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in frozen:
            if name in fresh:
                raise ConfigError(
                    f"freeze {part}: '{name}' would stay random: the weights given lack it. "
                    "Give `finetune` weights of the same model, or freeze less."
                )
            parameter.requires_grad_(False)
    model.stay_in_evaluation(parts)


def compile_model(model: DeformableDETR, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the whole forward pass in place; state-dict keys stay as they are.

    It is one graph without breaks: what cannot be compiled is an error, never a silent fallback.
    Level sizes are constants of the graph, so that each size of batch is compiled once, for
    training and for evaluation (a minute or more for ResNet-50): let `util.batch.pad_images`
    round sizes up, to a multiple of 128 for instance. PyTorch's limit on the number of graphs,
    past which it would stop compiling, is raised for the process; past ours it raises an error.
    """
    from torch._dynamo import config as dynamo  # slow to import

    dynamo.cache_size_limit = max(dynamo.cache_size_limit, _SHAPES)
    dynamo.accumulated_cache_size_limit = max(dynamo.accumulated_cache_size_limit, _SHAPES)
    model.compile(fullgraph=True, dynamic=False, backend=backend)


def set_checkpointing(model: DeformableDETR, parts: Collection[str]) -> None:
    """Enable activation checkpointing for these of "backbone", "encoder" and "decoder" alone.

    They drop their activations and compute them again in the backward pass. Gradients are the same
    to the last bit, dropout included.

    Raises:
        ConfigError: there is no such part.
    """
    modules: dict[str, Any] = {
        "backbone": model.backbone[0],
        "encoder": model.transformer.encoder,
        "decoder": model.transformer.decoder,
    }
    for part in parts:
        if part not in modules:
            raise ConfigError(
                f"activation_checkpointing: the model has no part '{part}'. "
                f"{nearest_hint(part, modules)}"
            )
    for part, module in modules.items():
        module.checkpointing = part in parts
