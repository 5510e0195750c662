"""`main.py train`: a new run, or one continued."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config, build_config, load_layers, merge_options
from datasets.build import build_dataset, load_index
from datasets.coco import CocoDetection
from datasets.loader import eval_loader, train_loader
from engine.checkpoint import check_same, load_checkpoint
from engine.coco_evaluator import CocoEvaluator
from engine.gallery import draw_gallery, evenly_spaced
from engine.optim import build_optimizer, build_scheduler
from engine.train import StepRunner
from engine.trainer import Trainer, Validation, count_parameters, versions
from models.build import ALL_STAGES, build_criterion, build_model
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from models.pretrained import Pretrained, load_pretrained
from models.transfer import transfer
from util.classes import Classes
from util.config import Values, changed_options, merge, to_yaml
from util.device import pick_device, seed_everything
from util.errors import ConfigError
from util.files import write_atomic
from util.run_log import RunLog, console


@dataclass(frozen=True)
class Start:
    """Where a run begins: its options, and the weights or the checkpoint it goes on from."""

    config: Config
    pretrained: Pretrained | None = None
    checkpoint: Path | None = None
    preprocessing: Mapping[str, Sequence[float]] | None = None  # the checkpoint's


def train(args: argparse.Namespace, given: Values) -> int:
    """Train on COCO-format data, or continue a run."""
    layers = load_layers(args.config, given)
    resume = layers.get("run", {}).get("resume", "")
    start = resumed(Path(resume), layers) if resume else fresh(layers)
    config = start.config
    output_dir = Path(config.run.output_dir)
    same_folder = bool(resume) and output_dir.resolve() == Path(resume).parent.resolve()
    if not same_folder and (output_dir / "last.pth").exists():
        raise ConfigError(
            f"--output_dir {output_dir}: holds a run already. Continue it with "
            f"--resume {output_dir / 'last.pth'}, or choose another folder."
        )
    console(f"options that differ from the defaults: {', '.join(changed_options(config))}")
    with RunLog(output_dir, tensorboard=config.run.tensorboard) as log:
        trainer = build_trainer(start, log)
        if start.checkpoint is not None:
            trainer.resume(start.checkpoint)
            console(f"resuming at epoch {trainer.epoch + 1}, step {trainer.runner.step}")
        write_atomic(output_dir / "config.yaml", to_yaml(config))
        return trainer.fit()


def fresh(layers: Values) -> Start:
    """Begin a new run; the model follows the weights of --finetune where no option says else."""
    source, pretrained = layers.get("run", {}).get("finetune", ""), None
    if source:
        pretrained = load_pretrained(source)
        layers = merge({"model": pretrained.model_options}, layers)
    config = build_config(layers)
    if not config.run.output_dir:
        raise ConfigError("--output_dir: expected a folder for the run, got none. Give one.")
    return Start(config, pretrained)


def resumed(checkpoint: Path, layers: Values) -> Start:
    """Continue a run with the options of its checkpoint, and those given now on top."""
    content = load_checkpoint(checkpoint)
    saved = build_config(content["config"])
    if "finetune" in layers.get("run", {}):
        raise ConfigError("--resume and --finetune: expected one of them. Resuming needs no other.")
    config = build_config(merge_options(content["config"], layers))
    check_same("model", asdict(saved.model), asdict(config.model), checkpoint)
    before, now = fixed_on_resume(saved), fixed_on_resume(config)
    check_same("batches and frozen parts", before, now, checkpoint)
    output_dir = layers.get("run", {}).get("output_dir", str(checkpoint.parent))
    run = replace(config.run, output_dir=output_dir, resume="")
    return Start(
        replace(config, run=run),
        checkpoint=checkpoint,
        preprocessing=content["preprocessing"],
    )


def fixed_on_resume(config: Config) -> dict[str, Any]:
    """Return what the place in an epoch and the optimiser's state depend on."""
    optim = config.optim
    frozen = ALL_STAGES if optim.lr_backbone == 0 else optim.frozen_stages
    return {"batch_size": optim.batch_size, "frozen_stages": frozen}


def build_trainer(start: Start, log: RunLog) -> Trainer:
    """Put data, model, optimiser and logs together."""
    config = start.config
    optim, run, data = config.optim, config.run, config.data
    seed_everything(run.seed)
    device = pick_device(run.device)
    train_index, val_index = load_index(data, "train"), load_index(data, "val")
    classes = train_index.classes
    model, mean, std = build_training_model(start, classes)
    train_set = build_dataset(data, train_index, train=True, mean=mean, std=std, seed=run.seed)
    val_set = build_dataset(data, val_index, train=False, mean=mean, std=std, classes=classes)
    for dataset in (train_set, val_set):
        console(dataset.index.report(config.model.num_queries))
    loader = train_loader(
        train_set,
        batch_size=optim.batch_size,
        num_workers=data.num_workers,
        seed=run.seed,
        aspect_ratio_grouping=data.aspect_ratio_grouping,
        pin_memory=device.type == "cuda",
    )
    optimizer = build_optimizer(model.to(device), optim)
    runner = StepRunner(
        model=model,
        criterion=build_criterion(config.loss),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, optim, len(loader)),
        device=device,
        log=log,
        clip_max_norm=optim.clip_max_norm,
    )
    console(
        f"{config.model.backbone}: {count_parameters(model):,} trained parameters, "
        f"{len(loader)} steps an epoch on {device}"
    )
    return Trainer(
        runner=runner,
        train_loader=loader,
        validation=build_validation(val_set, config, device),
        output_dir=Path(run.output_dir),
        identity={
            "classes": classes.to_json(),
            "config": asdict(config),
            "preprocessing": {"mean": list(mean), "std": list(std)},
            "versions": versions(),
        },
        epochs=optim.epochs,
        eval_every=run.eval_every,
        max_steps=run.max_steps,
    )


def build_training_model(
    start: Start, classes: Classes
) -> tuple[DeformableDETR, Sequence[float], Sequence[float]]:
    """Build the model with its first weights; return it and the pictures' mean and deviation."""
    config, pretrained = start.config, start.pretrained
    inherited = start.checkpoint is not None or (
        pretrained is not None
        and pretrained.model_options.get("backbone", config.model.backbone) == config.model.backbone
    )
    model = build_model(
        config.model,
        num_classes=len(classes),
        backbone_weights="none" if inherited else config.run.backbone_weights,
        frozen_stages=config.optim.frozen_stages if config.optim.lr_backbone else ALL_STAGES,
    )
    mean: Sequence[float] = model.backbone.mean
    std: Sequence[float] = model.backbone.std
    if start.preprocessing is not None:
        mean, std = start.preprocessing["mean"], start.preprocessing["std"]
    if pretrained is not None:
        nheads = pretrained.model_options.get("nheads", config.model.nheads)
        if nheads != config.model.nheads:  # the one difference that shapes do not show
            raise ConfigError(f"--nheads {config.model.nheads}: --finetune has {nheads}. Use that.")
        report = transfer(
            model, pretrained.state_dict,
            source_classes=pretrained.classes, target_classes=classes,
        )  # fmt: skip
        console(report.table())
        if inherited:
            mean, std = pretrained.image_mean or mean, pretrained.image_std or std
    return model, mean, std


def build_validation(dataset: CocoDetection, config: Config, device: torch.device) -> Validation:
    """Return what the trainer evaluates with."""
    coco_gt = dataset.index.coco_gt
    batches = eval_loader(
        dataset,
        batch_size=config.optim.eval_batch_size or config.optim.batch_size,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    shown = evenly_spaced(sorted(coco_gt.getImgIds()), config.run.num_pictures)
    return Validation(
        batches=batches,
        make_evaluator=partial(CocoEvaluator, coco_gt, dataset.label_to_category),
        postprocess=PostProcess(nms_iou=config.data.nms_iou),
        draw=lambda evaluator: draw_gallery(
            evaluator.detections, coco_gt, shown, dataset.read_picture
        ),
    )
