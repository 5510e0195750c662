"""Measure decoding and training transform in images/s on one core, beside the official pipeline.

    python -m tests.benchmarks.loader_throughput --images DIR --annotations FILE

The other pipeline is the published recipe of Deformable DETR, in Pillow: decode, flip, resize (half
of the time resize, crop, resize), convert to a tensor, normalise. Both draw the same random numbers
and take turns image by image. Times are processor time, so that other programs matter less. Sizes
and boxes are checked to be equal; pixels are compared.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from configs.schema import DataConfig
from datasets.build import build_dataset, load_index
from datasets.dataset import CocoDetection, seeded_generator
from datasets.sample import draw_chance, draw_integer, resized_size
from util.batch import UnreadableImage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def official(
    path: Path, boxes: Tensor, cfg: DataConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the image [3,H,W] and its boxes [K,4], xyxy in its pixels."""
    image = Image.open(path).convert("RGB")
    if draw_chance(cfg.hflip, generator):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor(
            [image.width, 0, image.width, 0]
        )
    if cfg.random_crop and draw_chance(0.5, generator):
        image, boxes = _resize(image, boxes, _pick(cfg.crop_scales, generator), None)
        low, high = cfg.crop_size
        w, h = (draw_integer(min(low, s), min(high, s), generator) for s in image.size)
        x = draw_integer(0, image.width - w, generator)
        y = draw_integer(0, image.height - h, generator)
        image = image.crop((x, y, x + w, y + h))
        boxes = torch.minimum(
            (boxes - torch.tensor([x, y, x, y])).clamp(min=0), torch.tensor([w, h, w, h])
        )
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
    image, boxes = _resize(image, boxes, _pick(cfg.train_scales, generator), cfg.max_size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    tensor = pixels.to(torch.float32).div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return tensor.clone().sub_(mean).div_(std), boxes


def _resize(
    image: Image.Image, boxes: Tensor, size: int, max_size: int | None
) -> tuple[Image.Image, Tensor]:
    h, w = resized_size(image.height, image.width, size, max_size)
    factor = torch.tensor([w / image.width, h / image.height] * 2)
    return image.resize((w, h), Image.Resampling.BILINEAR), boxes * factor


def _pick(values: Sequence[int], generator: torch.Generator) -> int:
    return values[draw_integer(0, len(values) - 1, generator)]


def compare(dataset: CocoDetection, cfg: DataConfig, epoch: int) -> list[tuple[float, ...]]:
    """Return (official seconds, our seconds, mean and maximum difference) of each image."""
    dataset.set_epoch(epoch)
    index = dataset.index
    rows: list[tuple[float, ...]] = []
    for position in range(len(index)):
        part = slice(index.first[position], index.first[position + 1])
        boxes = torch.from_numpy(index.boxes[part].copy())
        path = index.image_dir / index.images.file_names[position]
        started = time.thread_time()
        theirs, their_boxes = official(path, boxes, cfg, seeded_generator(0, epoch, position))
        middle = time.thread_time()
        item = dataset[position]
        ended = time.thread_time()
        assert not isinstance(item, UnreadableImage)
        ours, target = item
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        height, width = ours.shape[-2:]
        our_boxes = box_convert(target["boxes"], "cxcywh", "xyxy")
        our_boxes *= torch.tensor([width, height] * 2)
        torch.testing.assert_close(our_boxes, their_boxes, rtol=1e-5, atol=1e-3)
        steps = (ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        rows.append((middle - started, ended - middle, float(steps.mean()), float(steps.max())))
    return rows


def main() -> None:
    """Print throughput and differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train_scales", type=int, nargs="*")
    parser.add_argument("--random_crop", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cache_images", type=float, default=0.0, help="GB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = DataConfig(
        train_images=args.images,
        train_annotations=args.annotations,
        random_crop=args.random_crop,
        cache_images=args.cache_images,
        train_scales=tuple(args.train_scales or DataConfig().train_scales),
    )
    index = load_index(cfg, "train")
    dataset = build_dataset(cfg, index, train=True, mean=MEAN, std=STD, seed=0)
    compare(dataset, cfg, 0)  # warms up: reads the files into memory
    rounds = [compare(dataset, cfg, epoch) for epoch in range(1, args.rounds + 1)]
    seconds = [[sum(row[side] for row in rows) for rows in rounds] for side in (0, 1)]
    rates = [[len(index) / one for one in side] for side in seconds]
    for name, rate in zip(("official", "ours"), rates, strict=True):
        spread = f"{min(rate):.0f} to {max(rate):.0f}"
        print(f"{name:9}{statistics.median(rate):7.1f} images/s/core (rounds: {spread})")
    print(f"ours / official: {statistics.median(rates[1]) / statistics.median(rates[0]):.2f}")
    mean = statistics.mean(row[2] for rows in rounds for row in rows)
    most = max(row[3] for rows in rounds for row in rows)
    print(f"pixels differ by {mean:.3f} of 255 on average, {most:.0f} at most; boxes are equal")


if __name__ == "__main__":
    main()
