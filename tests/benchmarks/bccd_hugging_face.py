"""Fine-tune the Deformable DETR of `transformers` for a fixed time: the baseline for ours.

    python -m tests.benchmarks.bccd_hugging_face --images ../shared/datasets/bccd/BCCD/JPEGImages \
        --train_annotations ../shared/datasets/bccd/annotations/instances_train.json \
        --test_annotations ../shared/datasets/bccd/annotations/instances_test.json \
        --backbone_weights ../shared/weights/tf_efficientnet_lite0.safetensors \
        --minutes 30 --output runs/bccd_hugging_face.json

Any COCO-format data works. Used unchanged, with the source of each setting:

- Model, loss, matching, initialisation: `DeformableDetrForObjectDetection` with the values of
  `DeformableDetrConfig` (256 wide, 6 + 6 layers, 300 queries, 4 levels, one stage, no refinement).
  Its default trains without auxiliary losses; `--auxiliary_loss` adds them. With `--two_stage` it
  has no loss on the proposals, so their heads stay as initialised. Without `--auxiliary_loss` the
  refinements of the first five layers do not learn either.
- Optimisation: the "Object detection" task guide of the transformers documentation: learning rate
  5e-5 for all parameters, cosine schedule, weight decay 1e-4, gradient norm clipped at 0.01,
  batches of 8. `TrainingArguments` gives the rest: AdamW with betas 0.9 and 0.999, eps 1e-8, no
  warm-up, seed 42, and `Trainer` exempts biases and LayerNorm from weight decay.
- Images: `DeformableDetrImageProcessor` resizes, normalises, pads, and turns the model's outputs
  into boxes (no threshold, best 100). Scores: pycocotools.

What differs from the defaults, and why:

- The backbone is timm's tf_efficientnet_lite0 with given weights, hence mean and std 0.5. It is
  built with `freeze_batch_norm_2d=True`, timm's own freezing. Otherwise the model replaces timm's
  norms by frozen ones without their activation, and this network would have no activation left.
- Images are 240 x 480 (shortest and longest side) instead of 800 x 1333, at which a CPU processes
  only a few hundred images in half an hour.
- The horizontal flip is the only one of the guide's augmentations.
- The number of steps is budget / seconds per step. It is estimated again at each step, because
  other work on the machine changes the speed; the cosine's position is elapsed time / budget.

The budget covers reading images and training, not building the model or the evaluation.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
)

BACKBONE = "tf_efficientnet_lite0"
MEAN = STD = (0.5, 0.5, 0.5)
STRIDE_8_16_32 = (2, 3, 4)  # timm's indices of the maps
REPORT_SECONDS = 30.0
BEST_DETECTIONS = 100
STAT_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip

Sample = tuple[Image.Image, dict[str, Any]]
"""An image and its target in the form of the image processor: image_id, annotations."""


class Split:
    """Images of one COCO file; labels are contiguous, in order of category id."""

    def __init__(self, images: Path, annotations: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco: Any = COCO(str(annotations))
        self.images = images
        self.image_ids: list[int] = sorted(self.coco.imgs)
        self.category_ids: list[int] = sorted(self.coco.cats)

    @property
    def id2label(self) -> dict[int, str]:
        """Label -> name."""
        return {i: self.coco.cats[c]["name"] for i, c in enumerate(self.category_ids)}

    def sample(self, image_id: int, *, flip: bool) -> Sample:
        """Read an image; `flip` mirrors it and its boxes left to right."""
        with Image.open(self.images / self.coco.imgs[image_id]["file_name"]) as file:
            image = file.convert("RGB")
        annotations = []
        for annotation in self.coco.imgToAnns[image_id]:
            x, y, width, height = annotation["bbox"]
            if flip:
                x = image.width - x - width
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": self.category_ids.index(annotation["category_id"]),
                    "bbox": [x, y, width, height],
                    "area": annotation.get("area", width * height),
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
        if flip:
            image = ImageOps.mirror(image)
        return image, {"image_id": image_id, "annotations": annotations}

    def training_batches(self, size: int, seed: int) -> Iterator[list[Sample]]:
        """Yield batches endlessly, each epoch in a new order; half of the images are flipped."""
        generator = random.Random(seed)
        while True:
            order = generator.sample(self.image_ids, len(self.image_ids))
            for start in range(0, len(order), size):
                ids = order[start : start + size]
                yield [self.sample(i, flip=generator.random() < 0.5) for i in ids]


def build_model(
    id2label: dict[int, str], backbone_weights: Path, *, two_stage: bool, auxiliary_loss: bool
) -> Any:
    """Build the detector with a pretrained backbone and the rest newly initialised.

    Raises:
        ValueError: the weights lack a tensor of the backbone.
    """
    backbone = {
        "model_type": "timm_backbone",
        "backbone": BACKBONE,
        "out_indices": list(STRIDE_8_16_32),
        "features_only": True,
        "use_pretrained_backbone": False,
        "freeze_batch_norm_2d": True,
    }
    config = DeformableDetrConfig(
        backbone_config=backbone,
        id2label=id2label,
        label2id={name: i for i, name in id2label.items()},
        two_stage=two_stage,
        with_box_refine=two_stage,
        auxiliary_loss=auxiliary_loss,
    )
    model: Any = DeformableDetrForObjectDetection(config)
    # not strict, as the file has a classifier and the backbone has none
    result = model.model.backbone.model.load_state_dict(load_file(backbone_weights), strict=False)
    if result.missing_keys:
        raise ValueError(f"{backbone_weights} lacks {', '.join(result.missing_keys)}")
    return model


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW without decay of biases and LayerNorm, as in `Trainer`."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    decayed: list[Tensor] = []
    exempt: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (exempt if "bias" in name or id(parameter) in norms else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)


@dataclass(frozen=True)
class Training:
    """Result of a training run; one loss per step."""

    seconds: float
    images: int
    losses: list[float]


def train(
    model: Any,
    processor: Any,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[list[Sample]],
    *,
    budget: float,
    max_grad_norm: float,
) -> Training:
    """Train for `budget` seconds; the learning rate falls to zero along a cosine.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model.train()
    base_lr: float = optimizer.param_groups[0]["lr"]
    losses: list[float] = []
    images, elapsed, next_report, reported = 0, 0.0, 0.0, 0
    start = time.perf_counter()
    while elapsed < budget:
        for group in optimizer.param_groups:
            group["lr"] = base_lr * 0.5 * (1 + math.cos(math.pi * elapsed / budget))
        samples, targets = zip(*next(batches), strict=True)
        inputs = processor(images=list(samples), annotations=list(targets), return_tensors="pt")
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss is {losses[-1]} at step {len(losses)}")
        images += len(samples)
        elapsed = time.perf_counter() - start
        if elapsed >= next_report or elapsed >= budget:
            _report(losses[reported:], len(losses), elapsed, budget)
            reported, next_report = len(losses), elapsed + REPORT_SECONDS
    return Training(elapsed, images, losses)


def _report(recent: Sequence[float], step: int, elapsed: float, budget: float) -> None:
    total = max(step, round(step * budget / elapsed))
    print(
        f"step {step} of about {total}  loss {_mean(recent):.4f}  "
        f"{elapsed / step:.2f} s per step  ETA {max(0.0, budget - elapsed) / 60:.1f} min",
        flush=True,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def detect(model: Any, processor: Any, split: Split, batch_size: int) -> list[dict[str, Any]]:
    """Return the best detections of each image in the COCO results format."""
    model.eval()
    detections = []
    for start in range(0, len(split.image_ids), batch_size):
        image_ids = split.image_ids[start : start + batch_size]
        images = [split.sample(i, flip=False)[0] for i in image_ids]
        outputs = model(**processor(images=images, return_tensors="pt"))
        results = processor.post_process_object_detection(
            outputs,
            threshold=0.0,
            target_sizes=[(p.height, p.width) for p in images],
            top_k=BEST_DETECTIONS,
        )
        for image_id, result in zip(image_ids, results, strict=True):
            boxes = result["boxes"]
            boxes_xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
            detections += [
                {
                    "image_id": image_id,
                    "category_id": split.category_ids[label],
                    "bbox": box,
                    "score": score,
                }
                for label, box, score in zip(
                    result["labels"].tolist(),
                    boxes_xywh.tolist(),
                    result["scores"].tolist(),
                    strict=True,
                )
            ]
    return detections


def evaluate(split: Split, detections: list[dict[str, Any]]) -> dict[str, float]:
    """Return the 12 COCO numbers by name, and print them as pycocotools does."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(split.coco, split.coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(STAT_NAMES, map(float, evaluation.stats), strict=True))


def summary(options: argparse.Namespace, model: Any, training: Training) -> dict[str, Any]:
    """Return the results, settings and versions of the run as JSON values."""
    given = vars(options).items()
    return {
        "minutes": training.seconds / 60,
        "steps": len(training.losses),
        "images": training.images,
        "seconds_per_image": training.seconds / training.images,
        "loss_of_first_10_steps": _mean(training.losses[:10]),
        "loss_of_last_10_steps": _mean(training.losses[-10:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, transformers, timm)},
        },
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in given},
        "model_config": model.config.to_diff_dict(),
    }


def _existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"'{text}' does not exist.")
    return Path(text)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the module's docstring says where the defaults come from."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--images", type=_existing, required=True, help="folder of the images")
    parser.add_argument("--train_annotations", type=_existing, required=True, help="COCO file")
    parser.add_argument("--test_annotations", type=_existing, required=True, help="COCO file")
    parser.add_argument(
        "--backbone_weights", type=_existing, required=True, help=f"safetensors of timm {BACKBONE}"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--minutes", type=float, default=30.0, help="time to train")
    parser.add_argument("--short_side", type=int, default=240, help="pixels")
    parser.add_argument("--long_side", type=int, default=480, help="maximum in pixels")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--weight_decay", type=float, default=1e-4)
    parser.add_argument("--max_grad_norm", type=float, default=0.01)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--two_stage", action="store_true", help="with box refinement")
    parser.add_argument("--auxiliary_loss", action="store_true", help="a loss at each layer")
    return parser.parse_args(argv)


def main() -> None:
    """Train, evaluate, write the result."""
    options = parse_options()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(options.seed)
    train_split = Split(options.images, options.train_annotations)
    test_split = Split(options.images, options.test_annotations)
    if train_split.id2label != test_split.id2label:
        raise SystemExit("--test_annotations: its categories are not those of --train_annotations.")
    model = build_model(
        train_split.id2label,
        options.backbone_weights,
        two_stage=options.two_stage,
        auxiliary_loss=options.auxiliary_loss,
    )
    processor: Any = DeformableDetrImageProcessor(
        size={"shortest_edge": options.short_side, "longest_edge": options.long_side},
        image_mean=MEAN,
        image_std=STD,
    )
    training = train(
        model,
        processor,
        build_optimizer(model, options.lr, options.weight_decay),
        train_split.training_batches(options.batch_size, options.seed),
        budget=options.minutes * 60,
        max_grad_norm=options.max_grad_norm,
    )
    start = time.perf_counter()
    stats = evaluate(test_split, detect(model, processor, test_split, options.batch_size))
    result = {
        **stats,
        **summary(options, model, training),
        "epochs": training.images / len(train_split.image_ids),
        "evaluation_seconds": time.perf_counter() - start,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
