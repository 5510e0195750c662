"""From options to a `Trainer`: data, model with its first weights, optimiser, guards."""

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from configs.schema import Config, OptimConfig
from datasets.build import Split, build_dataset, load_index, seen_index, tiling_of
from datasets.dataset import CocoDetection
from datasets.eval_loader import eval_loader
from datasets.index import CocoIndex
from datasets.loader import TrainLoader
from datasets.split import BatchSplit
from datasets.tile_batches import TileBatches
from datasets.workers import loader_processes
from engine.attention_memory import check_attention
from engine.between_epochs import Validation, count_parameters
from engine.checkpoint import CheckpointFolder
from engine.data_report import write_data_report
from engine.ema import Ema
from engine.guards import FlatLoss, Guards, MemoryGuard, NonFiniteSteps, UnreadableImages
from engine.guards.timer import StepTimer
from engine.optim import Precision, Schedule
from engine.plan import RunPlan
from engine.probe import try_largest_step
from engine.run_log import RunLog
from engine.time_limit import Rhythm, TimeLimit
from engine.trainer import Trainer
from models.backbones.deformable_conv import OFFSETS
from models.build import (
    ALL_STAGES,
    build_criterion,
    build_model,
    compile_model,
    freeze,
    set_checkpointing,
)
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from models.weights.load import Pretrained
from models.weights.transfer import BACKBONE, transfer
from util.batch import Batch
from util.classes import Classes
from util.console import log
from util.errors import CheckpointError, ConfigError
from util.random_state import seed_everything
from util.version import __version__
from util.world import World

_LINEAR_PROJ = ("reference_points", "sampling_offsets")
_TABLES = ("relative_position_bias_table", "rpe_table")  # of relative positions: biases


def build_trainer(
    plan: RunPlan,
    world: World,
    device: torch.device,
    share: BatchSplit,
    run_log: RunLog,
    folder: CheckpointFolder,
) -> Trainer:
    """Put data, model, optimiser, guards and logs together; try the largest step."""
    config = plan.config
    optim, options, data = config.optim, config.run, config.data
    seed_everything(options.seed)
    train_index, val_index = load_data(plan, world)
    classes = train_index.classes
    model, mean, std = build_training_model(plan, classes)
    model = model.to(device)
    train_set = build_dataset(
        data,
        train_index,
        train=True,
        mean=mean,
        std=std,
        seed=options.seed,
        epochs=None if optim.max_hours else optim.epochs,
    )
    val_set = None
    if val_index is not None:
        val_set = build_dataset(data, val_index, train=False, mean=mean, std=std, classes=classes)
    num_workers = loader_processes(data.num_workers, local_size=world.local_size)
    loader, val_batches = build_loaders(
        config, train_set, val_set, share, num_workers=num_workers, on_gpu=device.type == "cuda"
    )
    trainer = assemble_trainer(
        config,
        model,
        loader,
        val_set,
        val_batches,
        world=world,
        device=device,
        run_log=run_log,
        folder=folder,
        identity={
            "classes": classes.to_json(),
            "config": asdict(config),
            "preprocessing": {"mean": list(mean), "std": list(std)},
            "versions": {
                "python": sys.version.split()[0],
                "torch": str(torch.__version__),
                "deformable_detr": __version__,
            },
        },
    )
    log.info(
        f"{config.model.backbone}: {count_parameters(model):,} trained parameters, "
        f"steps an epoch: {loader.steps}, on {device}"
    )
    log.info(f"a step: {_parts_of_step(share, loader, world, num_workers, len(train_set))}")
    if config.model.encoder_attn != "deformable":
        check_attention(config, model, train_set, share.batch_size)
    if options.probe:
        try_largest_step(trainer, train_set, share.batch_size)
    torch.manual_seed(options.seed + world.rank)  # dropout differs between processes
    return trainer


def _parts_of_step(
    share: BatchSplit, loader: TrainLoader, world: World, num_workers: int, available: int
) -> str:
    """Return how the images of an update, of those available, are split, for the log."""
    micro_batches = f"{loader.accumulation} micro-batch{'es' * (loader.accumulation > 1)}"
    processes = f"{world.size} process{'es' * (world.size > 1)}{', each' * (world.size > 1)}"
    fewer = f" (there are {available})" if available < share.effective else ""
    return (
        f"{loader.images} images{fewer} = {share.batch_size} at once x {micro_batches} x "
        f"{processes} with {num_workers} loader process{'es' * (num_workers != 1)}"
    )


def load_data(plan: RunPlan, world: World) -> tuple[CocoIndex, CocoIndex | None]:
    """Return training data, in tiles if they are cut, and whole validation data if there is some.

    data_report.json lists what was fixed or skipped.
    """
    options = plan.config.run
    splits: tuple[Split, ...] = ("train", "val") if options.validate else ("train",)
    indices = {
        split: load_index(plan.config.data, split, need_boxes=split == "train", world=world)
        for split in splits
    }
    tiles, scale = plan.config.tiles, plan.config.data.eval_scale
    seen = {s: seen_index(x, tiles, scale, train=s == "train") for s, x in indices.items()}
    for index in seen.values():
        log.info(index.report(plan.config.model.num_queries))
    if world.main:
        write_data_report(
            plan.output_dir,
            {split: index.data_report() for split, index in indices.items()},
            continued=plan.in_place,
        )
    val = indices.get("val")
    if val is not None and options.val_share < 1:
        whole, val = len(val), val.part(options.val_share)
        log.info(f"evaluating on {len(val)} of the {whole} validation images")
    return seen["train"], val


def build_loaders(
    config: Config,
    train_set: CocoDetection,
    val_set: CocoDetection | None,
    share: BatchSplit,
    *,
    num_workers: int,
    on_gpu: bool,
) -> tuple[TrainLoader, Iterable[Batch]]:
    """Return what loads this process's share of the training and of the validation images."""
    optim = config.optim
    loader = TrainLoader(
        train_set,
        share,
        num_workers=num_workers,
        seed=config.run.seed,
        aspect_ratio_grouping=config.data.aspect_ratio_grouping,
        pin_memory=on_gpu,
        pad_multiple=optim.pad_multiple,
    )
    if val_set is None:
        return loader, ()
    if tiling := tiling_of(config.tiles, config.data.eval_scale):
        return loader, TileBatches(
            val_set,
            tiling,
            batch_size=optim.eval_batch_size or optim.batch_size,
            rank=share.rank,
            world_size=share.world_size,
        )
    val_batches = eval_loader(
        val_set,
        batch_size=optim.eval_batch_size or optim.batch_size,
        num_workers=num_workers,
        pin_memory=on_gpu,
        rank=share.rank,
        world_size=share.world_size,
    )
    return loader, val_batches


def build_training_model(
    plan: RunPlan, classes: Classes
) -> tuple[DeformableDETR, Sequence[float], Sequence[float]]:
    """Build the model with its first weights; return it and the images' mean and deviation.

    Raises:
        ConfigError: `nheads` is not that of the weights, or frozen parts would stay random.
        CheckpointError: the weights are of another model.
    """
    config, pretrained = plan.config, plan.pretrained
    inherited = plan.checkpoint is not None or (
        pretrained is not None
        and not pretrained.other_backbone
        and pretrained.model_options.get("backbone", config.model.backbone) == config.model.backbone
    )
    backbone_weights = "none" if inherited else config.run.backbone_weights
    model = build_model(
        config.model,
        num_classes=len(classes),
        backbone_weights=backbone_weights,
        frozen_stages=config.optim.frozen_stages if config.optim.lr_backbone else ALL_STAGES,
        recipes=config.recipes,
    )
    mean: Sequence[float] = model.backbone.mean
    std: Sequence[float] = model.backbone.std
    if plan.preprocessing is not None:
        mean, std = plan.preprocessing["mean"], plan.preprocessing["std"]
    fresh: set[str] = set() if plan.checkpoint else set(model.state_dict())
    if pretrained is not None:
        fresh = load_pretrained_weights(model, pretrained, config, classes, backbone=inherited)
        if inherited:
            mean, std = pretrained.image_mean or mean, pretrained.image_std or std
        elif backbone_weights == "none":
            fresh |= {name for name in model.state_dict() if name.startswith(BACKBONE)}
    if backbone_weights != "none":
        fresh = {name for name in fresh if not name.startswith(BACKBONE)}
    freeze(model, config.optim.freeze, fresh=fresh)
    if plan.checkpoint is None:
        check_offsets(model)
    return model, mean, std


def check_offsets(model: DeformableDETR) -> None:
    """Refuse deformable convolutions whose offsets would stay zero.

    Raises:
        ConfigError: they are frozen before they have learned anything.
    """
    for name, parameter in model.named_parameters():
        if OFFSETS in name and not parameter.requires_grad and not parameter.any():
            raise ConfigError(
                "dcn: the backbone is frozen, and the offsets would stay zero. Let it learn "
                "(`lr_backbone`, `freeze`), or leave `dcn` out."
            )


def load_pretrained_weights(
    model: DeformableDETR,
    pretrained: Pretrained,
    config: Config,
    classes: Classes,
    *,
    backbone: bool,
) -> set[str]:
    """Fill a model from the weights of `finetune` and report how; return the names of the others.

    Without `backbone`, the model has a different one, which stays as it is.

    Raises:
        ConfigError: `nheads` is not that of the weights.
        CheckpointError: the weights are of another model.
    """
    nheads = pretrained.model_options.get("nheads", config.model.nheads)
    if nheads != config.model.nheads:  # the one difference that shapes do not show
        raise ConfigError(
            f"nheads {config.model.nheads}: the weights of `finetune` have {nheads}. Use that."
        )
    by_class = bool(pretrained.model_options.get("class_proposals"))
    scores: Literal["objects", "classes"] = "classes" if by_class else "objects"
    report = transfer(
        model,
        pretrained.state_dict,
        source_classes=pretrained.classes,
        target_classes=classes,
        backbone=backbone,
        proposal_scores=scores if by_class == config.model.class_proposals else "either",
    )
    log.info(report.table())
    random = [n for n in report.reinitialised if n.startswith(BACKBONE) and OFFSETS not in n]
    if random:
        raise CheckpointError(
            f"`backbone {config.model.backbone}`: does not match the weights of `finetune` "
            f"({len(random)} tensors missing, e.g. '{random[0]}'). Use the backbone of the weights."
        )
    if not backbone:
        log.info(
            f"backbone: {config.model.backbone} with weights '{config.run.backbone_weights}'; "
            "that of `finetune` is "
            f"{pretrained.other_backbone or pretrained.model_options['backbone']} and is not used"
        )
    return set(report.reinitialised)


def assemble_trainer(
    config: Config,
    model: DeformableDETR,
    loader: TrainLoader,
    val_set: CocoDetection | None,
    val_batches: Iterable[Batch],
    *,
    world: World,
    device: torch.device,
    run_log: RunLog,
    folder: CheckpointFolder,
    identity: Mapping[str, Any],
) -> Trainer:
    """Put a trainer together around a model that is on its device already."""
    optim, options = config.optim, config.run
    precision = Precision(optim.precision, device)
    set_checkpointing(model, optim.activation_checkpointing)
    ema = Ema(model, optim.ema_decay, optim.ema_tau) if optim.ema_decay else None
    if optim.compile:
        compile_model(model)
    optimizer, scheduler = build_optimizer(model, optim, loader.steps)
    criterion, output_dir = build_criterion(config.loss), Path(options.output_dir)
    validation = None
    if val_set is not None:
        data = config.data
        validation = Validation(
            dataset=val_set,
            batches=val_batches,
            postprocess=PostProcess(max_detections=data.num_select, nms_iou=data.nms_iou),
            criterion=criterion,
            precision=precision,
            world=world,
            device=device,
            log=run_log,
            output_dir=output_dir,
            num_images=options.num_images,
            tiling=tiling_of(config.tiles, data.eval_scale),
        )
    return Trainer(
        detector=model,
        model=distributed(model, world, exchange_norms=config.model.train_backbone_norm),
        criterion=criterion,
        optimizer=optimizer,
        scheduler=scheduler,
        precision=precision,
        ema=ema,
        clip_max_norm=optim.clip_max_norm,
        world=world,
        device=device,
        loader=loader,
        validation=validation,
        guards=build_guards(config, model, precision, world, accumulation=loader.accumulation),
        timer=StepTimer(device),
        log=run_log,
        output_dir=output_dir,
        checkpoints=folder,
        identity=identity,
        epochs=sys.maxsize if optim.max_hours else optim.epochs,
        eval_every=options.eval_every,
        patience=options.patience,
        save_every=options.save_every,
        max_steps=options.max_steps,
        time_limit=build_time_limit(config, loader.steps),
        seed=options.seed,
    )


def build_time_limit(config: Config, steps_per_epoch: int) -> TimeLimit | None:
    """Return what fits a run into `max_hours`, None where it ends after its epochs."""
    if not config.optim.max_hours:
        return None
    return TimeLimit(
        config.optim.max_hours,
        Rhythm(steps_per_epoch, config.run.eval_every, config.run.save_every),
        schedule=build_schedule(config.optim),
        unmixed_epochs=config.data.close_augment_epochs,
    )


def build_guards(
    config: Config, model: DeformableDETR, precision: Precision, world: World, *, accumulation: int
) -> Guards:
    """Return what watches the steps of this process, each of `accumulation` micro-batches."""
    optim, options = config.optim, config.run
    return Guards(
        UnreadableImages(),
        MemoryGuard(accumulation),
        NonFiniteSteps(
            model,
            precision,
            Path(options.output_dir),
            rank=world.rank,
            limit=options.max_nonfinite,
        ),
        FlatLoss(
            effective_batch=optim.effective_batch_size,
            lr=optim.lr,
            first_step=optim.warmup_steps,
            quiet=not world.main,
        ),
    )


def build_optimizer(
    model: nn.Module, optim: OptimConfig, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Build AdamW over the three official groups, and the schedule, stepped once per step.

    The groups are transformer and heads, backbone, and linear projections; offsets of deformable
    convolutions are a fourth, in a backbone that has them. Parameters that need no gradient are
    left out. Weight decay holds for everything, unless norms and biases have their own: then each
    group has a second one, of its parameters of one dimension and tables of relative positions.
    """
    rates = {
        "transformer": optim.lr,
        "backbone": optim.lr_backbone,
        "linear_proj": optim.lr * optim.lr_linear_proj_mult,
    }
    if any(OFFSETS in name for name, _ in model.named_parameters()):
        rates["dcn_offsets"] = optim.lr_backbone * optim.lr_dcn_mult
    groups: list[dict[str, Any]] = [
        {"name": name, "params": [], "lr": rate} for name, rate in rates.items()
    ]
    if optim.norm_weight_decay is not None:
        own = {"weight_decay": optim.norm_weight_decay}
        groups += [
            {**group, **own, "name": f"{group['name']}_norms", "params": []} for group in groups
        ]
    parameters_of = {group["name"]: group["params"] for group in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            linear = any(part in name for part in _LINEAR_PROJ)
            place = "linear_proj" if linear else "transformer"
            place = "backbone" if name.startswith(BACKBONE) else place
            place = "dcn_offsets" if OFFSETS in name else place
            apart = optim.norm_weight_decay is not None and (
                parameter.dim() <= 1 or name.endswith(_TABLES)
            )
            parameters_of[f"{place}_norms" if apart else place].append(parameter)
    optimizer = torch.optim.AdamW(
        groups,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for p in model.parameters()),
    )
    total = None if optim.max_hours else optim.epochs * steps_per_epoch
    return optimizer, LambdaLR(optimizer, build_schedule(optim).over(total))


def build_schedule(optim: OptimConfig) -> Schedule:
    """Return how the learning rate changes over the run."""
    return Schedule(
        kind=optim.lr_scheduler,
        epochs=optim.epochs,
        drop_every=optim.lr_drop,
        drop_epochs=optim.lr_drop_epochs,
        flat=optim.lr_flat,
        tail=optim.lr_tail,
        final=optim.lr_final,
        warmup_steps=optim.warmup_steps,
        warmup_shape=optim.warmup_shape,
    )


def distributed(model: DeformableDETR, world: World, *, exchange_norms: bool) -> nn.Module:
    """Wrap the model so that backward averages gradients over the processes."""
    if world.size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    old, new = "broadcast_buffers", "forward_sync_buffers"  # torch 2.15 renamed it
    options: dict[str, Any] = {new if new in known else old: exchange_norms}
    # no device_ids: the batch is on the device already, and targets stay on the host
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
