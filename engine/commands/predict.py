"""`main.py predict`: what a checkpoint finds in images."""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from configs.options import Values
from configs.schema import DataConfig, PredictConfig
from datasets.build import build_transform
from datasets.dataset import ImageFolder, find_images
from datasets.images import read_rgb
from datasets.loader import eval_loader
from engine.detector import load_detector, saved_data_options
from engine.predict import predict
from models.postprocess import PostProcess
from util.classes import Classes
from util.console import console
from util.device import pick_device
from util.errors import ConfigError
from util.files import write_atomic

_MOST_TOLD = 10


def predict_images(args: argparse.Namespace, given: Values) -> int:
    """Draw what a checkpoint finds in images, and write it as JSON."""
    options = PredictConfig(**given.get("predict", {}))
    if not options.input or not options.output_dir:
        raise ConfigError("predict: expected --input IMAGES ... and --output_dir DIR.")
    paths = find_images(options.input)
    device = pick_device(options.device)
    model, pretrained, mean, std = load_detector(options.checkpoint, device)
    chosen = {n: v for n in ("eval_scale", "max_size", "nms_iou") if (v := getattr(options, n))}
    data = DataConfig(**{**saved_data_options(pretrained), **chosen})
    dataset = ImageFolder(paths, build_transform(data, train=False, mean=mean, std=std))
    best = {} if "score_threshold" in given["predict"] else pretrained.thresholds
    thresholds = thresholds_by_label(pretrained.classes, best, options.score_threshold)
    output_dir = Path(options.output_dir)
    predict(
        model,
        PostProcess(nms_iou=data.nms_iou),
        eval_loader(dataset, batch_size=options.batch_size, num_workers=options.num_workers),
        paths=paths,
        read_image=partial(read_rgb, stated_size=None),
        classes=pretrained.classes,
        output_dir=output_dir,
        device=device,
        score_thresholds=thresholds,
    )
    tell_thresholds(output_dir, pretrained.classes, thresholds, best)
    return 0


def thresholds_by_label(
    classes: Classes, best: Mapping[str, float], otherwise: float
) -> list[float]:
    """Return the least score drawn of each label: the best of its class, where there is one."""
    return [best.get(classes.shown(label), otherwise) for label in range(len(classes))]


def tell_thresholds(
    output_dir: Path, classes: Classes, thresholds: Sequence[float], best: Mapping[str, float]
) -> None:
    """Write `score_thresholds.json`, and print which of them are the checkpoint's best."""
    by_name = {classes.shown(k): t for k, t in enumerate(thresholds) if classes.in_use(k)}
    path = output_dir / "score_thresholds.json"
    text = json.dumps(by_name, indent=1, ensure_ascii=False)
    write_atomic(path, text + "\n", errors="backslashreplace")
    known = [f"{name} {threshold:.2f}" for name, threshold in by_name.items() if name in best]
    if known:
        more = f", ... ({len(known)}, all in {path.name})" if len(known) > _MOST_TOLD else ""
        others = {f"{threshold:.2f}" for name, threshold in by_name.items() if name not in best}
        console(
            "score thresholds, those of the checkpoint's last evaluation: "
            f"{', '.join(known[:_MOST_TOLD])}{more}"
            f"{''.join(f'; of the other classes {threshold}' for threshold in others)}. "
            "--score_threshold sets one for all."
        )
