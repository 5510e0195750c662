"""Measure how long the preparation of a training image takes under each preset of augmentation.

    python -m tests.benchmarks.augmentation --images DIR --annotations FILE

The presets take turns epoch by epoch, in one thread. Times are processor time, so that other
programs matter less. Epochs are those in which a preset does all it can.
"""

import argparse
import statistics
import time
import typing

import torch

from configs.load import Given
from configs.schema import AUGMENTATIONS
from datasets.build import build_dataset, load_index
from datasets.dataset import CocoDetection

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPOCHS = 100  # of the run; those from 20 on have all of every preset


def prepare(dataset: CocoDetection, epoch: int) -> float:
    """Return the seconds of an epoch."""
    dataset.set_epoch(epoch)
    started = time.thread_time()
    for position in range(len(dataset)):
        dataset[position]
    return time.thread_time() - started


def main() -> None:
    """Print milliseconds per image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train_scales", type=int, nargs="*")
    parser.add_argument("--max_size", type=int, default=1333)
    parser.add_argument("--fixed_size", type=int, default=1024, help="of lsj")
    parser.add_argument("--cache_images", type=float, default=0.0, help="GB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given: dict[str, typing.Any] = {
        "train_images": args.images,
        "train_annotations": args.annotations,
        "max_size": args.max_size,
        "cache_images": args.cache_images,
    }
    if args.train_scales:
        given["train_scales"] = tuple(args.train_scales)
        given["eval_scale"] = max(args.train_scales)
    datasets = {}
    for name in AUGMENTATIONS:
        own = {"fixed_size": args.fixed_size} if name == "lsj" else {}
        data = Given({"data": {**given, **own, "augment": name}}).config().data
        index = load_index(data, "train")
        datasets[name] = build_dataset(
            data, index, train=True, mean=MEAN, std=STD, seed=0, epochs=EPOCHS
        )
        prepare(datasets[name], 20)  # warms up: reads the files into memory
    rounds = [
        {name: 1000 * prepare(data, 21 + epoch) / len(data) for name, data in datasets.items()}
        for epoch in range(args.rounds)
    ]
    for name in datasets:
        times = [one[name] for one in rounds]
        spread = f"{min(times):.1f} to {max(times):.1f}"
        print(f"{name:9}{statistics.median(times):6.1f} ms an image (rounds: {spread})")


if __name__ == "__main__":
    main()
