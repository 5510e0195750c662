"""Training steps on the GPU: precisions, compilation, activation checkpointing, Hugging Face's.

A step is forward, matching, losses, backward, clipping and fused AdamW, with everything that waits
for the GPU included. Images are random, 800 x 1066, seven boxes each. `peak_gib` is what torch
allocated at most, weights and moments included.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from configs.schema import LossConfig, ModelConfig
from engine.optim import Precision
from models.build import build_criterion, build_model, compile_model, set_checkpointing
from tests.gpu.results import emit, remaining
from util.batch import PaddedBatch, Target, pad_images

library: Any = transformers  # its annotations lack many of the arguments it takes
CLASSES = 91
TWO_STAGE: dict[str, Any] = {"with_box_refine": True, "two_stage": True}
Loss = Callable[[PaddedBatch, list[Target]], Tensor]


@dataclass(frozen=True)
class Size:
    """Images and the model's options: as published, or of a toy."""

    height: int
    width: int
    model: dict[str, Any]
    theirs: dict[str, Any]
    warm_up: int
    steps: int


TOY = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "num_queries": 10}
PUBLISHED = Size(800, 1066, {}, {"backbone": "resnet50"}, 3, 7)
SMALL = Size(
    64, 96, {**TOY, "dim_feedforward": 64, "backbone": "timm/test_resnet"},
    {"backbone": "test_resnet", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
     "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
     "decoder_ffn_dim": 64, "num_queries": 10, "two_stage_num_proposals": 10}, 1, 2,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    who: str  # "ours" or "hugging_face"
    two_stage: bool
    precision: str
    batch_size: int
    compiled: bool = False
    checkpointing: bool = False


def settings() -> list[Setting]:
    """Return the rows, those that matter most first."""
    rows = [
        Setting(who, two_stage, precision, 2)
        for two_stage in (False, True)
        for precision in ("fp32", "tf32", "bf16", "fp16")
        for who in ("ours", "hugging_face")
    ]
    rows += [
        Setting("ours", False, precision, batch_size, checkpointing=checkpointing)
        for batch_size in (2, 8)
        for precision in ("bf16", "fp32")
        for checkpointing in (True, False)
        if batch_size == 8 or checkpointing
    ]
    rows += [Setting("hugging_face", False, "bf16", 8)]
    return rows + [
        Setting("ours", two_stage, precision, 2, compiled=True)
        for precision in ("bf16", "fp32")
        for two_stage in (False, True)
    ]


def make_batch(size: Size, batch_size: int, device: torch.device) -> tuple[PaddedBatch, list[Any]]:
    """Return random images with seven boxes each."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(batch_size):
        images.append(torch.randn(3, size.height, size.width, generator=generator))
        boxes = torch.rand(7, 4, generator=generator) * 0.3 + 0.2
        labels = torch.randint(0, CLASSES, (7,), generator=generator)
        targets.append({"labels": labels, "boxes": boxes})
    return pad_images(images).to(device), targets


def build_ours(size: Size, setting: Setting, device: torch.device) -> tuple[nn.Module, Loss]:
    """Return our model, on the device and in training."""
    variant = TWO_STAGE if setting.two_stage else {}
    config = dataclasses.replace(ModelConfig(), **size.model, **variant)
    model = build_model(config, num_classes=CLASSES).to(device).train()
    if setting.checkpointing:
        set_checkpointing(model, ("backbone", "encoder", "decoder"))
    if setting.compiled:
        compile_model(model, "inductor" if device.type == "cuda" else "eager")
    criterion = build_criterion(LossConfig())

    def loss(batch: PaddedBatch, targets: list[Target]) -> Tensor:
        outputs = model(batch)
        with torch.autocast(device.type, enabled=False):
            return criterion(outputs, targets)["loss"]

    return model, loss


def build_theirs(size: Size, setting: Setting, device: torch.device) -> tuple[nn.Module, Loss]:
    """Return `DeformableDetrForObjectDetection`, on the device and in training."""
    config = library.DeformableDetrConfig(
        use_timm_backbone=True, num_labels=CLASSES, auxiliary_loss=True,
        with_box_refine=setting.two_stage, two_stage=setting.two_stage, **size.theirs,
    )  # fmt: skip
    model = library.DeformableDetrForObjectDetection(config).to(device).train()

    def loss(batch: PaddedBatch, targets: list[Target]) -> Tensor:
        labels = [
            {"class_labels": t["labels"].to(device), "boxes": t["boxes"].to(device)}
            for t in targets
        ]
        output = model(batch.images, pixel_mask=(~batch.mask).long(), labels=labels)
        result: Tensor = output.loss
        return result

    return model, loss


class Steps:
    """Training steps of a model, as the trainer makes them."""

    def __init__(self, size: Size, setting: Setting, device: torch.device) -> None:
        build = build_ours if setting.who == "ours" else build_theirs
        self.model, self.loss = build(size, setting, device)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-9, fused=True)
        self.precision = Precision(setting.precision, device)
        self.batch, self.targets = make_batch(size, setting.batch_size, device)

    def __call__(self) -> None:
        """Make one step and wait for its end."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            loss = self.loss(self.batch, self.targets)
        torch.autograd.backward(self.precision.scaler.scale(loss))
        self.precision.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.precision.step(self.optimizer, norm)
        float(loss.detach())  # waits


def measure(size: Size, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Return the median milliseconds of a step, and its peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    steps = Steps(size, setting, device)
    for _ in range(size.warm_up):
        steps()
    ready = time.perf_counter() - start
    times = []
    for _ in range(size.steps):
        start = time.perf_counter()
        steps()
        times.append((time.perf_counter() - start) * 1e3)
    found = {"ms": round(statistics.median(times), 2), "min_ms": round(min(times), 2),
             "first_steps_s": round(ready, 1)}  # fmt: skip
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return found


def available(rows: Sequence[Setting], device: torch.device) -> list[Setting]:
    """Return the rows that the device can compute."""
    if device.type == "cuda":
        return list(rows)
    return [row for row in rows if row.precision in ("fp32", "bf16") and row.batch_size == 2]


def main() -> int:
    """Run the command line; return 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    device, size = torch.device("cuda"), PUBLISHED
    if parser.parse_args().dry:
        device, size = torch.device("cpu"), SMALL
    passed = True
    for setting in available(settings(), device):
        if remaining() < (40 if setting.compiled and device.type == "cuda" else 8):
            emit("steps", **dataclasses.asdict(setting), error="no time left")
            continue
        try:
            found = measure(size, setting, device)
        except Exception as error:  # one that fails must not cost the others
            passed = False
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        emit("steps", **dataclasses.asdict(setting), **found)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
