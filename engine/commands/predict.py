"""`main.py predict`: what a checkpoint finds in images."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.options import Checked, option
from configs.schema import DataConfig
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
_THRESHOLD = 0.3  # minimum score drawn of a class without a best one


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Checked):
    """What `predict` needs; everything else is in the checkpoint."""

    checkpoint: str = option("", "our or official file, Hugging Face folder, or hf:NAME")
    input: tuple[str, ...] = option((), "images, folders or globs")
    output_dir: str = option("", "folder for images and predictions.json")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    batch_size: int = option(1, "images per step", low=1)
    score_threshold: float | None = option(
        None, "minimum score to draw (default: per-class thresholds from the checkpoint, else 0.3)",
        low=0, high=1,
    )  # fmt: skip
    eval_scale: int | None = option(
        None, "short side, pixels (default: the checkpoint's)", low=16, unset=0
    )
    max_size: int | None = option(
        None, "maximum long side, pixels (default: the checkpoint's)", low=16, unset=0
    )
    nms_iou: float | None = option(
        None, "NMS IoU threshold; 1 disables NMS (default: the checkpoint's)",
        above=0, high=1, unset=0,
    )  # fmt: skip
    num_workers: int = option(-1, "data-loading workers; -1: one per core, at most 8", low=-1)


SECTIONS = {"predict": PredictOptions}


def main(options: PredictOptions) -> int:
    """Draw what a checkpoint finds in images, and write it as JSON."""
    if not options.input or not options.output_dir:
        raise ConfigError("predict: needs `input IMAGES ...` and `output_dir DIR`.")
    paths = find_images(options.input)
    device = pick_device(options.device)
    model, pretrained, mean, std = load_detector(options.checkpoint, device)
    chosen = {name: getattr(options, name) for name in ("eval_scale", "max_size", "nms_iou")}
    given = {name: value for name, value in chosen.items() if value is not None}
    data = DataConfig(**{**saved_data_options(pretrained), **given})
    dataset = ImageFolder(paths, build_transform(data, train=False, mean=mean, std=std))
    threshold = options.score_threshold
    best = pretrained.thresholds if threshold is None else {}
    thresholds = thresholds_by_label(
        pretrained.classes, best, _THRESHOLD if threshold is None else threshold
    )
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
