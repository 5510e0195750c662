"""`main.py predict`: what a checkpoint finds in pictures."""

import argparse
from functools import partial
from pathlib import Path

from configs.schema import DataConfig, PredictConfig
from datasets.build import build_transform
from datasets.image_reading import read_rgb
from datasets.loader import eval_loader
from datasets.pictures import PictureDataset, find_pictures
from engine.commands.detector import load_detector, saved_data_options
from engine.predict import predict
from models.postprocess import PostProcess
from util.config import Values
from util.device import pick_device
from util.errors import ConfigError


def predict_pictures(args: argparse.Namespace, given: Values) -> int:
    """Draw what a checkpoint finds in pictures, and write it as JSON."""
    options = PredictConfig(**given.get("predict", {}))
    if not options.input or not options.output_dir:
        raise ConfigError("predict: expected --input PICTURES ... and --output_dir DIR.")
    paths = find_pictures(options.input)
    device = pick_device(options.device)
    model, pretrained, mean, std = load_detector(options.checkpoint, device)
    chosen = {n: v for n in ("eval_scale", "max_size", "nms_iou") if (v := getattr(options, n))}
    data = DataConfig(**{**saved_data_options(pretrained), **chosen})
    dataset = PictureDataset(paths, build_transform(data, train=False, mean=mean, std=std))
    predict(
        model,
        PostProcess(nms_iou=data.nms_iou),
        eval_loader(dataset, batch_size=options.batch_size, num_workers=options.num_workers),
        paths=paths,
        read_picture=partial(read_rgb, stated_size=None),
        classes=pretrained.classes,
        output_dir=Path(options.output_dir),
        device=device,
        score_threshold=options.score_threshold,
    )
    return 0
