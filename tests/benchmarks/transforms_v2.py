"""Our training transform beside the same recipe from torchvision.transforms.v2's classes.

    python -m tests.benchmarks.transforms_v2 --images DIR --annotations FILE

Why `datasets/transforms.py` is ours: both read and decode the same way and take turns epoch by
epoch on one core, in seconds of the processor. The classes draw from the global generator, which is
seeded for each image and restored; a crop of random sides is the one step that they lack. The
script also prints image sizes at which `RandomShortestSize` differs from the official rule.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from configs.schema import DataConfig
from datasets.build import build_dataset, load_index
from datasets.dataset import CocoDetection, seeded_generator
from datasets.sample import resized_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RandomSidesCrop:
    """Cut out a rectangle whose sides are drawn between two bounds, in pixels."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Crop image and boxes alike."""
        full = inputs["image"].shape[-2:]
        sides = [
            int(torch.randint(min(self.low, side), min(self.high, side) + 1, ())) for side in full
        ]
        corner = [
            int(torch.randint(0, side - part + 1, ()))
            for side, part in zip(full, sides, strict=True)
        ]
        cut = {
            name: v2.functional.crop(inputs[name], *corner, *sides) for name in ("image", "boxes")
        }
        return {**inputs, **cut}


def recipe(cfg: DataConfig) -> v2.Compose:
    """Return the official recipe in torchvision's classes."""
    scales = list(cfg.train_scales)
    last = v2.RandomShortestSize(scales, cfg.max_size, antialias=True)
    first = v2.RandomShortestSize(list(cfg.crop_scales), antialias=True)
    low, high = cfg.crop_size
    cropped = v2.Compose([first, RandomSidesCrop(low, high), v2.SanitizeBoundingBoxes(), last])
    return v2.Compose([
        v2.RandomHorizontalFlip(cfg.hflip),
        v2.RandomChoice([last, cropped]),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(MEAN, STD),
    ])  # fmt: skip


def theirs(dataset: CocoDetection, transform: v2.Compose) -> Callable[[int, int], None]:
    """Return what prepares an image of an epoch with the classes."""

    def prepare(position: int, epoch: int) -> None:
        sample = dataset._read_sample(position)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded_generator(0, epoch, position).initial_seed())
            size = (int(sample.image.shape[1]), int(sample.image.shape[2]))
            boxes = tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=size)
            image = tv_tensors.Image(sample.image)
            transform({"image": image, "boxes": boxes, "labels": sample.labels})

    return prepare


def seconds(prepare: Callable[[int, int], Any], count: int, epoch: int) -> float:
    """Return the processor's seconds for an epoch."""
    started = time.thread_time()
    for position in range(count):
        prepare(position, epoch)
    return time.thread_time() - started


def main() -> None:
    """Print both rates, and sizes that differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = DataConfig(train_images=args.images, train_annotations=args.annotations)
    index = load_index(cfg, "train")
    dataset = build_dataset(cfg, index, train=True, mean=MEAN, std=STD, seed=0)

    def ours(position: int, epoch: int) -> None:
        dataset.set_epoch(epoch)
        dataset[position]

    contenders = {"ours": ours, "transforms.v2": theirs(dataset, recipe(cfg))}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for epoch in range(args.rounds + 1):
        for name, prepare in contenders.items():
            rates[name].append(len(index) / seconds(prepare, len(index), epoch))
    for name, values in rates.items():
        print(f"{name:14}{statistics.median(values[1:]):7.1f} images/s/core")
    for height, width in dict.fromkeys((int(h), int(w)) for h, w in index.images.sizes):
        for scale in cfg.train_scales:
            factor = min(scale / min(height, width), cfg.max_size / max(height, width))
            official = resized_size(height, width, scale, cfg.max_size)
            if official != (int(height * factor), int(width * factor)):
                print(f"{height}x{width} at {scale}: official {official}, classes a pixel less")
                break


if __name__ == "__main__":
    main()
