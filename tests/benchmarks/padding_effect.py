r"""Measure what padding in evaluation batches does to AP.

    python -m tests.benchmarks.padding_effect --checkpoint runs/demo/last.pth \
        --coco_path data/shapes

Evaluates the same checkpoint twice: as `eval` does (batches of one size, no padding) and as the
official implementation does (images of any size padded to their common size).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

import torch
from torch.utils.data import DataLoader

from configs.schema import DataConfig
from datasets.build import build_dataset, load_index
from datasets.dataset import CocoDetection
from datasets.loader import collate, eval_loader
from engine.detector import load_detector, saved_data_options
from engine.evaluation.evaluator import CocoEvaluator, EvalResult
from models.postprocess import PostProcess
from util.batch import Batch


@torch.inference_mode()
def measure(
    model: torch.nn.Module, dataset: CocoDetection, batches: Iterable[Batch]
) -> tuple[EvalResult, dict[int, float]]:
    """Return COCO's numbers and each image's best score for these batches."""
    evaluator = CocoEvaluator(dataset.index.coco_gt, dataset.label_to_category)
    postprocess = PostProcess()
    for batch in batches:
        if batch.images is not None:
            sizes = torch.stack([t["orig_size"] for t in batch.targets])
            ids = [int(t["image_id"]) for t in batch.targets]
            evaluator.update(ids, postprocess(model(batch.images), sizes))
    best: dict[int, float] = {}
    for detection in evaluator.detections:
        image_id = detection["image_id"]
        best[image_id] = max(best.get(image_id, 0.0), detection["score"])
    return evaluator.evaluate(), best


def padded_share(batches: Iterable[Batch]) -> float:
    """Return the fraction of all pixels that is padding."""
    padded, total = 0, 0
    for batch in batches:
        if batch.images is not None:
            padded += int(batch.images.mask.sum())
            total += batch.images.mask.numel()
    return padded / total


def main(argv: Sequence[str]) -> int:
    """Print a small table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--coco_path", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    args = parser.parse_args(argv)
    model, pretrained, mean, std = load_detector(args.checkpoint, torch.device("cpu"))
    data = DataConfig(**{**saved_data_options(pretrained), "coco_path": args.coco_path})
    dataset = build_dataset(
        data, load_index(data, "val"), train=False, mean=mean, std=std, classes=pretrained.classes
    )
    ways = {
        "one size per batch": eval_loader(dataset, batch_size=args.batch_size, num_workers=0),
        "padded batches": DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate),
    }
    alone: dict[int, float] = {}
    for name, batches in ways.items():
        result, best = measure(model, dataset, batches)
        alone = alone or best
        change = max(abs(best[i] - alone[i]) for i in alone)
        print(
            f"{name}: AP {result.stats['AP']:.4f}, AP50 {result.stats['AP50']:.4f}, padding "
            f"{100 * padded_share(batches):.1f} % of pixels, best score of an image changes by at "
            f"most {change:.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
