"""Time training steps beside Hugging Face's, with the same weights, images, losses and dropout.

    python -m tests.benchmarks.training_step --batch_size 1 --scale 800 \
        --coco_path ../shared/datasets/coco_by
    python -m tests.benchmarks.training_step --scale 320 --profile

A step is forward, matching, losses, backward and fused AdamW of `deformable_detr_r50`.
`hugging_face` is `DeformableDetrForObjectDetection` of transformers. `ours` is this detector with
the attention backend of this machine, and `pure_op` the same with the op in plain PyTorch. All take
turns in one process, in float32 and under autocast to bfloat16. `--memory` measures the peak of
each in a separate process, with weights, gradients and moments (Linux).

The losses of both without dropout are printed first, and agree. For this, `class_cost` and the
dropouts of theirs have the published values, and the class loss of ours has the weight of theirs.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from configs.schema import DataConfig, LossConfig, ModelConfig
from datasets.build import build_dataset, load_index
from models.build import build_criterion, build_model
from models.weights.hugging_face import to_official
from models.weights.transfer import load_strict
from ops import use_backend
from util.batch import PaddedBatch, Target, UnreadableImage, pad_images

library: Any = transformers  # its annotations lack many of the arguments it takes
CLASSES = 91
NAMES = ("hugging_face", "pure_op", "ours")
PRECISIONS = ("fp32", "bf16")
KINDS = {  # kernels by parts of their names
    "convolution": ("conv",),
    "matrix product": ("mm", "linear"),
    "deformable attention": ("msdeform", "ms_deform", "grid_sampler"),
    "random numbers": ("bernoulli", "random"),
    "norms": ("norm",),
    "copies and casts": ("copy", "cat", "clone"),
    "optimiser": ("adam",),
}


@dataclass
class Contender:
    """A model in training; `loss` runs its forward pass and its criterion.

    `backend` is that of the attention op; None: the default of this machine.
    """

    model: nn.Module
    loss: Callable[[PaddedBatch, list[Target], str], Tensor]
    optimizer: torch.optim.Optimizer
    backend: str | None = None

    def step(self, batch: PaddedBatch, targets: list[Target], precision: str) -> None:
        """Run a training step."""
        self.optimizer.zero_grad(set_to_none=True)
        with use_backend(self.backend) if self.backend else contextlib.nullcontext():
            torch.autograd.backward(self.loss(batch, targets, precision))
        self.optimizer.step()


def autocast(precision: str) -> torch.autocast:
    """Return a new context for a forward pass."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return fused AdamW; its learning rate is too small to change the model."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=1e-9, fused=True)


def hugging_face(dropout: float) -> Contender:
    """Return their model with fresh weights, residual branches damped as in a trained one."""
    config = library.DeformableDetrConfig(
        use_timm_backbone=True, backbone="resnet50", num_labels=CLASSES, auxiliary_loss=True,
        class_cost=2, dropout=dropout, activation_dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    model = library.DeformableDetrForObjectDetection(config).train()
    for name, buffer in model.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.3)

    def loss(batch: PaddedBatch, targets: list[Target], precision: str) -> Tensor:
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        with autocast(precision):
            output = model(batch.images, pixel_mask=(~batch.mask).long(), labels=labels)
        result: Tensor = output.loss
        return result

    return Contender(model, loss, optimizer_of(model))


def ours(dropout: float, theirs: nn.Module | None, backend: str | None) -> Contender:
    """Return our model, with the weights of `theirs` if given."""
    model = build_model(ModelConfig(dropout=dropout), num_classes=CLASSES).train()
    if theirs is not None:
        options = {"with_box_refine": False, "two_stage": False, "dec_layers": 6,
                   "backbone": "resnet50"}  # fmt: skip
        load_strict(model, to_official(theirs.state_dict(), options, "theirs"), "theirs")
    criterion = build_criterion(LossConfig(cls_loss_coef=1.0))

    def loss(batch: PaddedBatch, targets: list[Target], precision: str) -> Tensor:
        with autocast(precision):
            outputs = model(batch)
        return criterion(outputs, targets)["loss"]

    return Contender(model, loss, optimizer_of(model), backend)


def load_batch(options: argparse.Namespace) -> tuple[PaddedBatch, list[Target]]:
    """Return images of a COCO-format set with their boxes, or random ones with seven boxes."""
    if not options.coco_path:
        height, width = options.scale, round(options.scale * 4 / 3)
        images = [torch.randn(3, height, width) for _ in range(options.batch_size)]
        targets = [
            {"labels": torch.randint(0, CLASSES, (7,)), "boxes": torch.rand(7, 4) * 0.3 + 0.2}
            for _ in images
        ]
        return pad_images(images), targets
    config = DataConfig(coco_path=options.coco_path, eval_scale=options.scale)
    index = load_index(config, "val")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    dataset = build_dataset(config, index, train=False, mean=mean, std=std)
    items = [dataset[i] for i in range(options.batch_size)]
    read = [item for item in items if not isinstance(item, UnreadableImage)]
    return pad_images([image for image, _ in read]), [target for _, target in read]


def compare(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each round of every contender, after a warm-up round."""
    theirs = hugging_face(options.dropout)
    contenders = {
        "hugging_face": theirs,
        "pure_op": ours(options.dropout, theirs.model, "reference"),
        "ours": ours(options.dropout, theirs.model, None),
    }
    batch, targets = load_batch(options)
    boxes = sum(len(t["labels"]) for t in targets)
    print(f"images {tuple(batch.images.shape)}, {boxes} boxes, {torch.get_num_threads()} threads")
    for name in ("hugging_face", "ours"):
        with torch.no_grad(), evaluation(contenders[name].model):
            print(f"loss of {name}: {float(contenders[name].loss(batch, targets, 'fp32')):.5f}")
    seconds = defaultdict(list)
    for round_number in range(options.rounds + 1):
        for precision in options.precisions:
            for name in options.contenders:
                start = time.perf_counter()
                contenders[name].step(batch, targets, precision)
                if round_number:
                    seconds[f"{name} {precision}"].append(time.perf_counter() - start)
    if options.profile:
        for precision in options.precisions:
            print_profile(contenders["ours"], batch, targets, precision)
    return seconds


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the context."""
    model.eval()
    yield
    model.train()


def print_profile(
    contender: Contender, batch: PaddedBatch, targets: list[Target], precision: str
) -> None:
    """Print the time of a step by part of the step and by kind of kernel."""
    marks = [time.perf_counter()]
    contender.optimizer.zero_grad(set_to_none=True)
    loss = contender.loss(batch, targets, precision)
    marks.append(time.perf_counter())
    torch.autograd.backward(loss)
    marks.append(time.perf_counter())
    contender.optimizer.step()
    marks.append(time.perf_counter())
    parts = ("forward, matching, losses", "backward", "optimiser")
    spans = [end - start for start, end in zip(marks[:-1], marks[1:], strict=True)]
    print_shares(f"{precision} by part", dict(zip(parts, spans, strict=True)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        contender.step(batch, targets, precision)
    kinds: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "other")
        kinds[kind] += event.self_cpu_time_total / 1e6
    print_shares(f"{precision} by kernel", kinds)


def print_shares(title: str, seconds: dict[str, float]) -> None:
    """Print seconds and percentages, largest first."""
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {s:.2f} s ({s / total:.0%})" for name, s in ranked)
    print(f"{title}: {total:.2f} s: {listed}")


def peak_of(name: str, options: argparse.Namespace) -> int:
    """Return the peak memory in bytes of this process after two steps of one contender."""
    if name == "hugging_face":
        contender = hugging_face(options.dropout)
    else:
        contender = ours(options.dropout, None, "reference" if name == "pure_op" else None)
    batch, targets = load_batch(options)
    for _ in range(2):
        contender.step(batch, targets, options.precisions[0])
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_memory(options: argparse.Namespace) -> dict[str, int]:
    """Return the peak memory of every contender, each from a separate process."""
    given = [a for a in sys.argv[1:] if a not in ("--memory", "--profile")]
    peaks = {}
    for precision in options.precisions:
        for name in options.contenders:
            command = [sys.executable, "-m", "tests.benchmarks.training_step", *given]
            command += ["--peak_of", name, "--precisions", precision]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[f"{name} {precision}"] = int(output.split()[-1])
    return peaks


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=800, help="short side of the images")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--coco_path", default="", help="real images, else random ones")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--profile", action="store_true", help="print where our time goes")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--peak_of", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peak_of:
        print(peak_of(options.peak_of, options))
        return
    peaks = measure_memory(options) if options.memory else {}
    seconds = compare(options)
    for name, values in seconds.items():
        precision = name.split()[1]
        first = seconds[f"{options.contenders[0]} {precision}"]
        base = seconds[f"{options.contenders[0]} {options.precisions[0]}"]
        middle = statistics.median(values)
        memory = f", peak {peaks[name] / 2**30:.2f} GiB" if peaks else ""
        print(
            f"{name:18s} {middle:6.2f} s (minimum {min(values):6.2f}), "
            f"{statistics.median(first) / middle:5.2f} times {options.contenders[0]}, "
            f"{statistics.median(base) / middle:5.2f} times it in {options.precisions[0]}{memory}"
        )
    if options.output:
        options.output.write_text(json.dumps({"seconds": seconds, "peak_bytes": peaks}, indent=1))


if __name__ == "__main__":
    main()
