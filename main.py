"""Deformable DETR from the command line: train, eval, predict, doctor."""

import argparse
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.schema import (
    SECTIONS,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PredictConfig,
    build_config,
    load_layers,
    merge_options,
)
from datasets.build import build_dataset, build_transform, load_index
from datasets.coco import CocoDetection
from datasets.image_reading import read_rgb
from datasets.loader import eval_loader, train_loader
from datasets.pictures import PictureDataset, find_pictures
from engine.checkpoint import check_same_model, load_checkpoint
from engine.coco_evaluator import CocoEvaluator, save_results
from engine.evaluate import evaluate
from engine.gallery import draw_gallery, evenly_spaced
from engine.optim import build_optimizer, build_scheduler
from engine.predict import predict
from engine.train import StepRunner
from engine.trainer import EXIT_INTERRUPTED, Trainer, Validation, count_parameters, versions
from models.build import ALL_STAGES, build_criterion, build_model
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from models.pretrained import Pretrained, load_pretrained
from models.transfer import load_strict, transfer
from ops.self_test import self_test
from util.classes import Classes
from util.config import Values, add_options, changed_options, merge, parse_flags, to_yaml
from util.device import pick_device, seed_everything
from util.errors import ConfigError, UserError
from util.files import write_atomic
from util.run_log import RunLog, console

EXIT_USER_ERROR = 2


def train(args: argparse.Namespace, given: Values) -> int:
    """Train on COCO-format data, or continue a run."""
    resume = given.get("run", {}).get("resume", "")
    pretrained = None
    if resume:
        config = resumed_config(Path(resume), args.config, given)
    else:
        config, pretrained = fresh_config(args.config, given)
    output_dir = Path(config.run.output_dir)
    if not resume and (output_dir / "last.pth").exists():
        raise ConfigError(
            f"--output_dir {output_dir}: holds a run already. Continue it with "
            f"--resume {output_dir / 'last.pth'}, or choose another folder."
        )
    console(f"options that differ from the defaults: {', '.join(changed_options(config))}")
    with RunLog(output_dir, tensorboard=config.run.tensorboard) as log:
        trainer = build_trainer(config, pretrained, log)
        write_atomic(output_dir / "config.yaml", to_yaml(config))
        if resume:
            trainer.resume(Path(resume))
            console(f"resuming at epoch {trainer.epoch + 1}, step {trainer.runner.step}")
        return trainer.fit()


def fresh_config(file: str | None, given: Values) -> tuple[Config, Pretrained | None]:
    """Return the options of a new run; the model follows the weights of --finetune."""
    layers = load_layers(file, given)
    source, pretrained = layers.get("run", {}).get("finetune", ""), None
    if source:
        pretrained = load_pretrained(source)
        layers = merge({"model": pretrained.model_options}, layers)
    config = build_config(layers)
    if not config.run.output_dir:
        raise ConfigError("--output_dir: expected a folder for the run, got none. Give one.")
    return config, pretrained


def resumed_config(checkpoint: Path, file: str | None, given: Values) -> Config:
    """Return the options of the checkpoint's run, with those given now on top."""
    saved = load_checkpoint(checkpoint)["config"]
    config = build_config(merge_options(saved, load_layers(file, given)))
    check_same_model(asdict(build_config(saved).model), asdict(config.model), checkpoint)
    output_dir = given.get("run", {}).get("output_dir", str(checkpoint.parent))
    return replace(config, run=replace(config.run, output_dir=output_dir, resume=""))


def build_trainer(config: Config, pretrained: Pretrained | None, log: RunLog) -> Trainer:
    """Put data, model, optimiser and logs together."""
    optim, run, data = config.optim, config.run, config.data
    seed_everything(run.seed)
    device = pick_device(run.device)
    train_index, val_index = load_index(data, "train"), load_index(data, "val")
    classes = train_index.classes
    model, mean, std = build_training_model(config, pretrained, classes)
    train_set = build_dataset(data, train_index, train=True, mean=mean, std=std, seed=run.seed)
    val_set = build_dataset(data, val_index, train=False, mean=mean, std=std, classes=classes)
    for dataset in (train_set, val_set):
        report_data(dataset, config.model.num_queries)
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
    identity = {
        "classes": classes.to_json(),
        "config": asdict(config),
        "preprocessing": {"mean": list(mean), "std": list(std)},
        "versions": versions(),
    }
    return Trainer(
        runner=runner,
        train_loader=loader,
        validation=build_validation(val_set, config, device),
        output_dir=Path(run.output_dir),
        identity=identity,
        epochs=optim.epochs,
        eval_every=run.eval_every,
        max_steps=run.max_steps,
    )


def build_training_model(
    config: Config, pretrained: Pretrained | None, classes: Classes
) -> tuple[DeformableDETR, Sequence[float], Sequence[float]]:
    """Build the model with its first weights; return it and the pictures' mean and deviation."""
    model = build_model(
        config.model,
        num_classes=len(classes),
        backbone_weights="none" if pretrained else config.run.backbone_weights,
        frozen_stages=config.optim.frozen_stages if config.optim.lr_backbone else ALL_STAGES,
    )
    mean, std = model.backbone.mean, model.backbone.std
    if pretrained is not None:
        nheads = pretrained.model_options.get("nheads", config.model.nheads)
        if nheads != config.model.nheads:  # the one difference that shapes do not show
            raise ConfigError(
                f"--nheads {config.model.nheads}: the weights of --finetune have {nheads}. "
                f"Use --nheads {nheads}."
            )
        report = transfer(
            model, pretrained.state_dict,
            source_classes=pretrained.classes, target_classes=classes,
        )  # fmt: skip
        console(report.table())
        mean, std = pretrained.image_mean or mean, pretrained.image_std or std
    return model, mean, std


def report_data(dataset: CocoDetection, num_queries: int) -> None:
    """Print what a data set holds and what was mended in it."""
    index = dataset.index
    console(index.summary())
    notices = list(index.notices)
    crowded = index.boxes_per_picture > num_queries
    if crowded.any():
        notices.append(
            f"{int(crowded.sum())} pictures have more boxes (up to "
            f"{int(index.boxes_per_picture.max())}) than the model has queries ({num_queries}): "
            "the rest can never be found. Raise --num_queries."
        )
    for notice in notices:
        console(f"  notice: {notice}")


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
        postprocess=PostProcess(),
        draw=lambda evaluator: draw_gallery(
            evaluator.detections, coco_gt, shown, dataset.read_picture
        ),
    )


def load_detector(
    source: str, device: torch.device
) -> tuple[DeformableDETR, Pretrained, Sequence[float], Sequence[float]]:
    """Load a checkpoint of any kind; return the model, its origin, and mean and deviation."""
    if not source:
        raise ConfigError("--checkpoint: expected a file, a Hugging Face folder or hf:NAME.")
    pretrained = load_pretrained(source)
    model_config = ModelConfig(**pretrained.model_options)
    model = build_model(model_config, num_classes=len(pretrained.classes))
    load_strict(model, pretrained.state_dict, source)
    mean = pretrained.image_mean or model.backbone.mean
    std = pretrained.image_std or model.backbone.std
    return model.to(device).eval(), pretrained, mean, std


def saved_data_options(pretrained: Pretrained) -> dict[str, Any]:
    """Return the data options that a checkpoint carries."""
    if pretrained.config is not None:
        return dict(pretrained.config["data"])
    if pretrained.image_size is not None:
        return dict(zip(("eval_scale", "max_size"), pretrained.image_size, strict=True))
    return {}


def beside(source: str) -> Path:
    """Return the folder of a checkpoint.

    Raises:
        ConfigError: it lies on the hub.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"--output_dir: expected a folder for the results of {source}.")
    return path if path.is_dir() else path.parent


def evaluate_checkpoint(args: argparse.Namespace, given: Values) -> int:
    """Evaluate a checkpoint on COCO-format data."""
    options = EvalConfig(**given.get("eval", {}))
    device = pick_device(options.device)
    model, pretrained, mean, std = load_detector(options.checkpoint, device)
    output_dir = Path(options.output_dir) if options.output_dir else beside(options.checkpoint)
    saved = {"data": saved_data_options(pretrained)}
    data = DataConfig(**merge_options(saved, {"data": given.get("data", {})})["data"])
    index = load_index(data, "val")
    dataset = build_dataset(
        data, index, train=False, mean=mean, std=std, classes=pretrained.classes
    )
    report_data(dataset, model.transformer.num_queries)
    optim = (pretrained.config or {}).get("optim", {})
    batch_size = options.batch_size or optim.get("eval_batch_size") or optim.get("batch_size", 1)
    batches = eval_loader(dataset, batch_size=batch_size, num_workers=data.num_workers)
    evaluator = CocoEvaluator(index.coco_gt, dataset.label_to_category)
    result, _ = evaluate(model, PostProcess(), batches, evaluator, device=device)
    console(result.table())
    save_results(output_dir, result, evaluator.detections)
    console(f"written: {output_dir / 'eval' / 'results.json'}, detections.json")
    return 0


def predict_pictures(args: argparse.Namespace, given: Values) -> int:
    """Draw what a checkpoint finds in pictures, and write it as JSON."""
    options = PredictConfig(**given.get("predict", {}))
    if not options.input or not options.output_dir:
        raise ConfigError("predict: expected --input PICTURES ... and --output_dir DIR.")
    paths = find_pictures(options.input)
    device = pick_device(options.device)
    model, pretrained, mean, std = load_detector(options.checkpoint, device)
    sizes = {n: v for n in ("eval_scale", "max_size") if (v := getattr(options, n))}
    data = DataConfig(**{**saved_data_options(pretrained), **sizes})
    dataset = PictureDataset(paths, build_transform(data, train=False, mean=mean, std=std))
    predict(
        model,
        PostProcess(),
        eval_loader(dataset, batch_size=options.batch_size, num_workers=options.num_workers),
        paths=paths,
        read_picture=partial(read_rgb, stated_size=None),
        classes=pretrained.classes,
        output_dir=Path(options.output_dir),
        device=device,
        score_threshold=options.score_threshold,
    )
    return 0


def doctor(args: argparse.Namespace, given: Values) -> int:
    """Say what this machine offers, and check the attention op."""
    console(f"python {platform.python_version()} on {platform.platform()}")
    console(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    healthy = True
    for device in devices:
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        error = self_test(device)
        healthy &= error < 1e-4
        verdict = "ok" if error < 1e-4 else "FAILED"
        console(f"{device} ({name}): ms_deform_attn reference {verdict}, error {error:.1e}")
    return 0 if healthy else 1


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, Values], int], dict[str, type[Any]]]] = {
    "train": (train, dict(SECTIONS)),
    "eval": (evaluate_checkpoint, {"eval": EvalConfig, "data": DataConfig}),
    "predict": (predict_pictures, {"predict": PredictConfig}),
    "doctor": (doctor, {}),
}


def parse_command_line(argv: Sequence[str]) -> tuple[str, argparse.Namespace, Values]:
    """Split a command line into the command, its own arguments, and options by section."""
    usage = "main.py {" + ",".join(COMMANDS) + "} [options]"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {usage}\n")
        for name, (function, _) in COMMANDS.items():
            print(f"  {name:9}{function.__doc__}")
        print("\n`main.py COMMAND --help` lists a command's options.")
        raise SystemExit(0 if argv else EXIT_USER_ERROR)
    if argv[0] not in COMMANDS:
        raise ConfigError(f"command line: unknown command '{argv[0]}'. Usage: {usage}")
    function, sections = COMMANDS[argv[0]]
    parser = argparse.ArgumentParser(
        prog=f"main.py {argv[0]}", description=function.__doc__, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback on user errors")
    if argv[0] == "train":
        parser.add_argument("--config", metavar="FILE", help="preset or YAML file of options")
    add_options(parser, sections)
    args, given = parse_flags(parser, argv[1:], sections)
    return argv[0], args, given


def main(argv: Sequence[str]) -> int:
    """Run a command; a user's error is one line and exit code 2."""
    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists heads it leaves out on purpose
    try:
        command, args, given = parse_command_line(argv)
        return COMMANDS[command][0](args, given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
