r"""Measure what the fast preparation of training images does to a detector's AP.

    python -m tests.benchmarks.transform_effect --checkpoint runs/bccd/last.pth \
        --images BCCD/JPEGImages --annotations instances_test.json

Evaluates the same checkpoint on images prepared as `eval` does (Pillow's pixels, the official
order of operations) and as training does (8-bit vectorised resize, reduced JPEG decoding).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from datasets.build import build_dataset, load_index
from datasets.eval_loader import eval_loader
from engine.detector import Detector
from engine.evaluation.evaluate import evaluate
from engine.evaluation.evaluator import Evaluator
from engine.evaluation.matching import Truth
from models.postprocess import PostProcess
from util.batch import UnreadableImage


def main(argv: Sequence[str]) -> int:
    """Print the AP of both, and the mean difference of their pixels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--eval_scale", type=int, default=0, help="0: that of the checkpoint")
    args = parser.parse_args(argv)
    detector = Detector.load(args.checkpoint, device="cpu")
    data = replace(
        detector.data, coco_path="", val_images=args.images, val_annotations=args.annotations,
        eval_scale=args.eval_scale or detector.data.eval_scale,
    )  # fmt: skip
    plain = replace(
        data, train_scales=(data.eval_scale,), hflip=0.0, random_crop=False,
        scale_jitter=(1.0, 1.0), fixed_size=0, zoom_out=0.0, color_jitter=0.0, mosaic=0.0,
        mixup=0.0, copy_blend=0.0,
    )  # fmt: skip
    index = load_index(data, "val")
    truth = Truth.of(index)
    ways = {
        name: build_dataset(
            options,
            index,
            train=name == "fast",
            mean=detector.mean,
            std=detector.std,
            classes=detector.classes,
        )
        for name, options in (("exact", data), ("fast", plain))
    }
    for name, dataset in ways.items():
        result, _ = evaluate(
            detector.model,
            PostProcess(nms_iou=data.nms_iou),
            eval_loader(dataset, batch_size=1, num_workers=0),
            Evaluator(truth, dataset.label_to_category),
            device=detector.device,
        )
        print(f"{name}: AP {result.stats['AP']:.4f}, AP50 {result.stats['AP50']:.4f}")
    steps = 255 * torch.tensor(detector.std).view(3, 1, 1)
    exact, fast = (dataset[0] for dataset in ways.values())
    if not isinstance(exact, UnreadableImage) and not isinstance(fast, UnreadableImage):
        apart = float(((exact[0] - fast[0]).abs() * steps).mean())
        print(f"pixels of the first image differ by {apart:.3f} of 255 on average")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
