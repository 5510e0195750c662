"""`main.py train`: a new run, or one continued."""

import argparse
import inspect
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.options import Values, changed_options, merge, to_yaml
from configs.schema import Config, RunConfig, build_config, load_layers, merge_options
from datasets.build import build_dataset, load_index
from datasets.dataset import CocoDetection
from datasets.index import CocoIndex
from datasets.loader import BatchSplit, TrainLoader, eval_loader, split_batch, train_loader
from engine.checkpoint import CheckpointFolder, check_same, load_checkpoint
from engine.commands.first_weights import Start, build_training_model
from engine.detector import saved_options
from engine.ema import Ema
from engine.evaluation.evaluator import Evaluator
from engine.evaluation.gallery import draw_gallery, evenly_spaced
from engine.evaluation.matching import Truth
from engine.guards.flat_loss import FlatLossWatchdog
from engine.guards.memory import probe
from engine.guards.nonfinite import NonfiniteRecorder
from engine.guards.timer import StepTimer
from engine.metrics import StepLog
from engine.optim import build_optimizer, build_scheduler
from engine.precision import Precision
from engine.processes import launch
from engine.run_lock import run_lock
from engine.run_log import RunLog
from engine.train import StepRunner
from engine.trainer import Trainer, count_parameters, versions
from engine.validation import Validation
from models.build import ALL_STAGES, build_criterion
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from models.switches import compile_model, set_checkpointing
from models.weights.load import load_pretrained
from util.console import console
from util.device import own_device, pick_device, seed_everything, set_deterministic
from util.distributed import World, destroy_process_group, init_process_group, started_by_launcher
from util.errors import ConfigError
from util.files import write_atomic


@dataclass(frozen=True)
class Place:
    """Where this process of a run computes, and its part of every effective batch."""

    world: World
    device: torch.device
    share: BatchSplit

    def plan(self, loader: TrainLoader) -> str:
        """Return what makes up a step, and what loads it."""
        return (
            f"a step: {self.share.effective} images = {self.share.batch_size} at once x "
            f"{loader.accumulation} micro-batches x {self.world.size} processes, "
            f"each with {loader.num_workers} loader processes"
        )


def train(args: argparse.Namespace, given: Values) -> int:
    """Train on COCO-format data, or continue a run."""
    layers = load_layers(args.config, given)
    options = run_options(layers)
    if options.gpus > 1 and not started_by_launcher():
        return launch(
            Path(sys.argv[0]), sys.argv[1:],
            processes=options.gpus, device=options.device, restarts=options.max_restarts,
        )  # fmt: skip
    if options.deterministic:
        set_deterministic()
    device = pick_device(options.device)
    world = init_process_group(device.type)
    try:
        return begin(options, layers, world, own_device(device, world))
    finally:
        destroy_process_group()


def run_options(layers: Values) -> RunConfig:
    """Return the options of the run itself, on top of those of the checkpoint it resumes."""
    given = layers.get("run", {})
    saved: dict[str, Any] = {}
    if given.get("resume", "") not in ("", "auto"):
        config = load_checkpoint(Path(given["resume"]))["config"]
        saved = saved_options(config, given["resume"])["run"]
        saved["output_dir"] = str(Path(given["resume"]).parent)  # it may have been moved
    return RunConfig(**{**saved, **given})


def begin(options: RunConfig, layers: Values, world: World, device: torch.device) -> int:
    """Start a run or go on with one, alone in its folder; return the exit code.

    Raises:
        ConfigError: `auto` without a folder.
        CheckpointError: no checkpoint of the folder is sound.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if options.resume != "auto" and not restarted:
        start = resumed(Path(options.resume), layers) if options.resume else fresh(layers)
        with run_lock(Path(start.config.run.output_dir), world):
            return run(start, world, device)
    if not options.output_dir:
        raise ConfigError("--resume auto: expected --output_dir with it, got none. Give both.")
    folder = CheckpointFolder(Path(options.output_dir), keep=options.keep_checkpoints)
    with run_lock(Path(options.output_dir), world):  # a run that is ending saves once more
        checkpoint = world.broadcast(folder.newest_sound() if world.main else None)
        if checkpoint is None and options.resume != "auto" and options.resume:
            checkpoint = Path(options.resume)  # nothing was saved yet before the restart
        start = resumed(checkpoint, layers) if checkpoint else fresh(layers)
        return run(start, world, device)


def run(start: Start, world: World, device: torch.device) -> int:
    """Train from `start` on; return the exit code."""
    config, output_dir = start.config, Path(start.config.run.output_dir)
    folder = CheckpointFolder(output_dir, keep=config.run.keep_checkpoints)
    if not continues_in_place(start) and world.broadcast(folder.last.exists()):
        raise ConfigError(
            f"--output_dir {output_dir}: holds a run already. Continue it with --resume auto, or "
            "choose another folder."
        )
    console(f"options that differ from the defaults: {', '.join(changed_options(config))}")
    optim = config.optim
    share = split_batch(
        optim.effective_batch_size, most=optim.batch_size, rank=world.rank, world_size=world.size
    )
    optim = replace(optim, effective_batch_size=share.effective)
    start = replace(start, config=replace(config, optim=optim))
    with RunLog(output_dir, tensorboard=config.run.tensorboard, enabled=world.main) as log:
        trainer = build_trainer(start, Place(world, device, share), folder, log)
        if start.checkpoint is not None:
            trainer.resume(start.checkpoint)
            console(f"resuming at epoch {trainer.epoch + 1}, step {trainer.runner.step}")
        if world.main:
            folder.remove_remains()
            write_atomic(output_dir / "config.yaml", to_yaml(start.config))
        return trainer.fit()


def continues_in_place(start: Start) -> bool:
    """Tell whether a run is continued where its checkpoint is."""
    folder = Path(start.config.run.output_dir).resolve()
    return start.checkpoint is not None and folder == start.checkpoint.parent.resolve()


def fresh(layers: Values) -> Start:
    """Begin a new run; the model follows the weights of --finetune where no option says else."""
    source, pretrained = layers.get("run", {}).get("finetune", ""), None
    if source:
        pretrained = load_pretrained(source)
        layers = merge(saved_options({"model": pretrained.model_options}, source), layers)
    config = build_config(layers)
    if not config.run.output_dir:
        raise ConfigError("--output_dir: expected a folder for the run, got none. Give one.")
    return Start(replace(config, run=replace(config.run, resume="")), pretrained)


def resumed(checkpoint: Path, layers: Values) -> Start:
    """Continue a run with the options of its checkpoint, and those given now on top."""
    content = load_checkpoint(checkpoint)
    options = saved_options(content["config"], str(checkpoint))
    saved = build_config(options)
    given = layers.get("run", {})
    if "finetune" in given and given.get("resume", "") not in ("", "auto"):
        raise ConfigError("--resume and --finetune: expected one of them. Resuming needs no other.")
    config = build_config(merge_options(options, layers))
    check_same("model", asdict(saved.model), asdict(config.model), checkpoint)
    before, now = fixed_on_resume(saved), fixed_on_resume(config)
    check_same("batches and frozen parts", before, now, checkpoint)
    output_dir = given.get("output_dir", str(checkpoint.parent))
    return Start(
        replace(config, run=replace(config.run, output_dir=output_dir, resume="")),
        checkpoint=checkpoint,
        preprocessing=content["preprocessing"],
    )


def fixed_on_resume(config: Config) -> dict[str, Any]:
    """Return what the place in an epoch and the optimiser's state depend on."""
    optim = config.optim
    frozen = ALL_STAGES if optim.lr_backbone == 0 else optim.frozen_stages
    return {
        "effective_batch_size": optim.effective_batch_size,
        "frozen_stages": frozen,
        "freeze": optim.freeze,
    }


def build_trainer(start: Start, place: Place, folder: CheckpointFolder, log: RunLog) -> Trainer:
    """Put data, model, optimiser and logs together."""
    config, world = start.config, place.world
    optim, options, data = config.optim, config.run, config.data
    seed_everything(options.seed)
    train_index, val_index = load_data(start, world)
    classes = train_index.classes
    model, mean, std = build_training_model(start, classes)
    train_set = build_dataset(
        data, train_index, train=True, mean=mean, std=std, seed=options.seed, epochs=optim.epochs
    )
    val_set = build_dataset(data, val_index, train=False, mean=mean, std=std, classes=classes)
    loader = train_loader(
        train_set,
        place.share,
        num_workers=data.num_workers,
        seed=options.seed,
        aspect_ratio_grouping=data.aspect_ratio_grouping,
        pin_memory=place.device.type == "cuda",
        pad_multiple=optim.pad_multiple,
    )
    runner = build_runner(model.to(place.device), config, place, log, steps_per_epoch=loader.steps)
    runner.accumulation = loader.accumulation
    console(
        f"{config.model.backbone}: {count_parameters(model):,} trained parameters, "
        f"{loader.steps} steps an epoch on {place.device}"
    )
    console(place.plan(loader))
    if options.probe:
        try_largest_step(runner, train_set, place)
    torch.manual_seed(options.seed + world.rank)  # each process drops other activations out
    return Trainer(
        runner=runner,
        log=log,
        train_loader=loader,
        validation=build_validation(val_set, config, place, log),
        output_dir=Path(options.output_dir),
        checkpoints=folder,
        identity={
            "classes": classes.to_json(),
            "config": asdict(config),
            "preprocessing": {"mean": list(mean), "std": list(std)},
            "versions": versions(),
        },
        epochs=optim.epochs,
        eval_every=options.eval_every,
        save_every=options.save_every,
        max_steps=options.max_steps,
    )


def load_data(start: Start, world: World) -> tuple[CocoIndex, CocoIndex]:
    """Return training and validation data; data_report.json lists what was mended or left out."""
    config, path = start.config, Path(start.config.run.output_dir) / "data_report.json"
    train_index, val_index = load_index(config.data, "train"), load_index(config.data, "val")
    report = {}
    for split, index in (("train", train_index), ("val", val_index)):
        console(index.report(config.model.num_queries))
        report[split] = index.data_report()
    if world.main:
        if continues_in_place(start) and path.is_file():
            before, key = json.loads(path.read_text(encoding="utf-8")), "unreadable_in_training"
            report["train"].update({k: v for k, v in before["train"].items() if k == key})
        write_atomic(path, json.dumps(report, indent=1))
    return train_index, val_index


def build_runner(
    model: DeformableDETR, config: Config, place: Place, log: RunLog, *, steps_per_epoch: int
) -> StepRunner:
    """Return what runs the steps of one process."""
    optim, world, device = config.optim, place.world, place.device
    precision = Precision(optim.precision, device)
    set_checkpointing(model, optim.activation_checkpointing)
    ema = Ema(model, optim.ema_decay) if optim.ema_decay else None
    if optim.compile:
        compile_model(model)
    criterion = build_criterion(config.loss)
    optimizer = build_optimizer(model, optim)
    output_dir = Path(config.run.output_dir)
    steps = StepLog(
        log=log,
        weights=criterion,
        world=world,
        timer=StepTimer(device),
        precision=precision,
        recorder=NonfiniteRecorder(output_dir, world.rank, config.run.max_nonfinite),
        watchdog=build_watchdog(config),
        watch_from=optim.warmup_steps,
    )
    return StepRunner(
        model=model,
        trained=distributed(model, place, exchange_norms=config.model.train_backbone_norm),
        criterion=criterion,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, optim, steps_per_epoch),
        device=device,
        steps=steps,
        precision=precision,
        clip_max_norm=optim.clip_max_norm,
        world=world,
        ema=ema,
    )


def build_watchdog(config: Config) -> FlatLossWatchdog:
    """Return what warns of a loss that stays where an untrained model has it."""
    loss, layers = config.loss, 1
    if config.model.aux_loss:
        layers = config.model.dec_layers + int(config.model.two_stage)
    weights = loss.cls_loss_coef + loss.bbox_loss_coef + loss.giou_loss_coef
    return FlatLossWatchdog(
        effective_batch=config.optim.effective_batch_size,
        lr=config.optim.lr,
        low=layers * weights / 3,
    )


def distributed(model: DeformableDETR, place: Place, *, exchange_norms: bool) -> nn.Module:
    """Wrap the model so that backward averages gradients over the processes."""
    if place.world.size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    old, new = "broadcast_buffers", "forward_sync_buffers"  # torch 2.15 renamed it
    options: dict[str, Any] = {new if new in known else old: exchange_norms}
    devices = [place.device.index] if place.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, **options
    )


def try_largest_step(runner: StepRunner, dataset: CocoDetection, place: Place) -> None:
    """Run one step of the largest shape with the most boxes, which changes nothing, and say so."""
    sizes = [s for s in (dataset.largest_size(*size) for size in dataset.image_sizes()) if s]
    if not sizes:
        return
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if place.share.batch_size == 1:
        height, width = max(sizes, key=lambda size: size[0] * size[1])
    buffers = [(b, b.clone()) for b in runner.model.buffers()]
    runner.model.train()
    result = probe(
        lambda images, targets: runner.probe(images, targets),
        device=place.device,
        shape=(height, width),
        num_boxes=int(dataset.index.boxes_per_image.max(initial=0)),
        batch_size=place.share.batch_size,
        later=sum(2 * p.nbytes for p in runner.model.parameters() if p.requires_grad),  # AdamW's
    )
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    console(result.line())


def build_validation(
    dataset: CocoDetection, config: Config, place: Place, log: RunLog
) -> Validation:
    """Return what the run evaluates with."""
    index = dataset.index
    truth = Truth.of(index.classes, index.images, index.annotations)
    batches = eval_loader(
        dataset,
        batch_size=config.optim.eval_batch_size or config.optim.batch_size,
        num_workers=config.data.num_workers,
        pin_memory=place.device.type == "cuda",
        rank=place.world.rank,
        world_size=place.world.size,
    )
    shown = evenly_spaced(truth.image_ids.tolist(), config.run.num_images)
    return Validation(
        batches=batches,
        make_evaluator=partial(Evaluator, truth, dataset.label_to_category),
        postprocess=PostProcess(nms_iou=config.data.nms_iou),
        draw=lambda evaluator: draw_gallery(
            evaluator.detections(), truth, shown, dataset.read_image
        ),
        output_dir=Path(config.run.output_dir),
        log=log,
    )
