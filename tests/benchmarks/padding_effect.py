r"""Measure what padding in evaluation batches does to AP.

    python -m tests.benchmarks.padding_effect --checkpoint runs/demo/last.pth \
        --coco_path data/shapes

Evaluates the same checkpoint twice: as `eval` does (batches of one size, no padding) and as the
official implementation does (images of any size padded to their common size).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from datasets.build import build_dataset, load_index
from datasets.collate import collate
from datasets.dataset import CocoDetection
from datasets.eval_loader import eval_loader
from engine.detector import Detector
from engine.evaluation.evaluator import EvalResult, Evaluator
from engine.evaluation.matching import Truth
from models.postprocess import PostProcess
from util.batch import Batch


@torch.inference_mode()
def measure(
    model: torch.nn.Module, dataset: CocoDetection, batches: Iterable[Batch]
) -> tuple[EvalResult, dict[int, float]]:
    """Return COCO's numbers and each image's best score for these batches."""
    index = dataset.index
    truth = Truth.of(index)
    evaluator = Evaluator(truth, dataset.label_to_category)
    postprocess = PostProcess()
    for batch in batches:
        if batch.images is not None:
            sizes = torch.stack([t["orig_size"] for t in batch.targets])
            ids = [int(t["image_id"]) for t in batch.targets]
            evaluator.update(ids, postprocess(model(batch.images), sizes))
    best: dict[int, float] = {}
    found = evaluator.detections()
    for image_id, score in zip(truth.image_ids[found.image].tolist(), found.score, strict=True):
        best[image_id] = max(best.get(image_id, 0.0), float(score))
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
    detector = Detector.load(args.checkpoint, device="cpu")
    data = replace(detector.data, coco_path=args.coco_path)
    dataset = build_dataset(
        data, load_index(data, "val"), train=False,
        mean=detector.mean, std=detector.std, classes=detector.classes,
    )  # fmt: skip
    ways = {
        "one size per batch": eval_loader(dataset, batch_size=args.batch_size, num_workers=0),
        "padded batches": DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate),
    }
    alone: dict[int, float] = {}
    for name, batches in ways.items():
        result, best = measure(detector.model, dataset, batches)
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
