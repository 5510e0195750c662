"""The model of a training run with its first weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from models.build import ALL_STAGES, build_model
from models.deformable_detr import DeformableDETR
from models.switches import freeze
from models.weights.load import Pretrained
from models.weights.transfer import BACKBONE, transfer
from util.classes import Classes
from util.console import console
from util.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Start:
    """Where a run begins: its options, and the weights or the checkpoint it goes on from."""

    config: Config
    pretrained: Pretrained | None = None
    checkpoint: Path | None = None
    preprocessing: Mapping[str, Sequence[float]] | None = None  # the checkpoint's


def build_training_model(
    start: Start, classes: Classes
) -> tuple[DeformableDETR, Sequence[float], Sequence[float]]:
    """Build the model with its first weights; return it and the images' mean and deviation.

    Raises:
        ConfigError: `nheads` is not that of the weights, or frozen parts would stay random.
        CheckpointError: the weights are of another model.
    """
    config, pretrained = start.config, start.pretrained
    inherited = start.checkpoint is not None or (
        pretrained is not None
        and pretrained.model_options.get("backbone", config.model.backbone) == config.model.backbone
    )
    backbone_weights = "none" if inherited else config.run.backbone_weights
    model = build_model(
        config.model,
        num_classes=len(classes),
        backbone_weights=backbone_weights,
        frozen_stages=config.optim.frozen_stages if config.optim.lr_backbone else ALL_STAGES,
    )
    mean: Sequence[float] = model.backbone.mean
    std: Sequence[float] = model.backbone.std
    if start.preprocessing is not None:
        mean, std = start.preprocessing["mean"], start.preprocessing["std"]
    fresh: set[str] = set() if start.checkpoint else set(model.state_dict())
    if pretrained is not None:
        fresh = load_pretrained_weights(model, pretrained, config, classes, backbone=inherited)
        if inherited:
            mean, std = pretrained.image_mean or mean, pretrained.image_std or std
        elif backbone_weights == "none":
            fresh |= {name for name in model.state_dict() if name.startswith(BACKBONE)}
    if backbone_weights != "none":
        fresh = {name for name in fresh if not name.startswith(BACKBONE)}
    freeze(model, config.optim.freeze, fresh=fresh)
    return model, mean, std


def load_pretrained_weights(
    model: DeformableDETR,
    pretrained: Pretrained,
    config: Config,
    classes: Classes,
    *,
    backbone: bool,
) -> set[str]:
    """Fill a model from the weights of --finetune and say how; return the names of the others.

    Without `backbone`, the model's is another one than theirs and stays as it is.

    Raises:
        ConfigError: `nheads` is not that of the weights.
        CheckpointError: the weights are of another model.
    """
    nheads = pretrained.model_options.get("nheads", config.model.nheads)
    if nheads != config.model.nheads:  # the one difference that shapes do not show
        raise ConfigError(f"--nheads {config.model.nheads}: --finetune has {nheads}. Use that.")
    report = transfer(
        model,
        pretrained.state_dict,
        source_classes=pretrained.classes,
        target_classes=classes,
        backbone=backbone,
    )
    console(report.table())
    random = [name for name in report.reinitialised if name.startswith(BACKBONE)]
    if random:
        raise CheckpointError(
            f"--backbone {config.model.backbone}: expected the backbone of --finetune, got one of "
            f"which {len(random)} tensors are not in it, as '{random[0]}'. Set that of the weights."
        )
    if not backbone:
        console(
            f"backbone: {config.model.backbone} with weights '{config.run.backbone_weights}'; that "
            f"of --finetune is {pretrained.model_options['backbone']} and is not taken"
        )
    return set(report.reinitialised)
