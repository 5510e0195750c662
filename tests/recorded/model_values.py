"""What a small detector computes in float64, as plain numbers that a refactor must not change.

`python -m tests.recorded.model_values` writes `model_values.json`. It was last run at 10a4dea,
before the redesign for version 0.1.0; run it again only for a change meant to change numbers.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import LossConfig
from models.build import build_criterion, build_model
from tests.unit.models.small import VARIANTS, small_config
from util.batch import Target, pad_images

FILE = Path(__file__).with_suffix(".json")
NUM_CLASSES = 5


def _values(name: str, shape: torch.Size) -> Tensor:
    """Return standard normal values that depend on a name and a shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter and buffer a value that depends on its first name."""
    for name, parameter in model.named_parameters():
        values = _values(name, parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(values / parameter[0].numel() ** 0.5)
        elif name.endswith(("sampling_offsets.bias", "class_embed.bias", "layers.2.bias")):
            parameter.add_(0.1 * values)  # their start is no random draw
        else:
            parameter.copy_(0.1 * values + name.endswith("weight"))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "bias")):
            buffer.copy_(0.1 * _values(name, buffer.shape))
        elif name.endswith(("running_var", "weight")):
            buffer.copy_(1 + 0.2 * _values(name, buffer.shape).tanh())


def images_and_targets() -> tuple[list[Tensor], list[Target]]:
    """Return three images of different sizes with four, no and two boxes."""
    images = [
        _values(f"image {i}", torch.Size((3, h, w)))
        for i, (h, w) in enumerate([(96, 128), (64, 80), (110, 70)])
    ]
    targets: list[Target] = []
    for i, count in enumerate((4, 0, 2)):
        boxes = _values(f"boxes {i}", torch.Size((count, 4))).sigmoid()
        labels = torch.arange(count) * 2 % NUM_CLASSES
        targets.append({"labels": labels, "boxes": boxes * torch.tensor([1.0, 1.0, 0.5, 0.5])})
    return images, targets


def compute(variant: str) -> dict[str, Any]:
    """Return logits, boxes, losses and two sums over each gradient of one training step."""
    config = small_config(**VARIANTS[variant], dropout=0.0)
    model = build_model(config, num_classes=NUM_CLASSES).double().train()
    fill(model)
    images, targets = images_and_targets()
    outputs = model(pad_images(images))
    losses = build_criterion(LossConfig())(outputs, targets)
    torch.autograd.backward(losses["loss"])
    gradients = {
        name: [
            float(parameter.grad.abs().sum()),
            float((parameter.grad * _values(f"direction {name}", parameter.shape)).sum()),
        ]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {
        "keys": sorted(model.state_dict()),
        "logits": outputs["pred_logits"].tolist(),
        "boxes": outputs["pred_boxes"].tolist(),
        "losses": {name: value.item() for name, value in losses.items()},
        "gradients": gradients,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps({variant: compute(variant) for variant in VARIANTS}))
