"""Small models with weights that leave nothing trivial."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.queries import DetectorOutput, GroupOutput

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}


def small_config(**options: Any) -> ModelConfig:
    """Return options of a detector that runs in milliseconds."""
    values: dict[str, Any] = {
        "backbone": "timm/mobilenetv3_small_050", "hidden_dim": 64, "nheads": 4, "enc_layers": 2,
        "dec_layers": 3, "dim_feedforward": 48, "num_queries": 7, "enc_n_points": 2,
        "dec_n_points": 3,
    }  # fmt: skip
    return ModelConfig(**(values | options))


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every parameter, so that offsets, attention, boxes and biases all depend on input."""
    for name, parameter in model.named_parameters():
        scale = 0.5 if "sampling_offsets" in name else 0.1
        parameter.add_(torch.randn_like(parameter) * scale)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "bias")):
            buffer.add_(torch.randn_like(buffer) * 0.1)
        elif name.endswith(("running_var", "weight")):
            buffer.mul_(torch.rand_like(buffer) * 0.5 + 0.75)


def small_model(*, num_classes: int = 5, **options: Any) -> DeformableDETR:
    """Return a perturbed float64 detector in evaluation mode."""
    model = build_model(small_config(**options), num_classes=num_classes).double().eval()
    perturb(model)
    return model


@functools.lru_cache(maxsize=6)
def _built(config: ModelConfig, num_classes: int) -> DeformableDETR:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(config, num_classes=num_classes)


def built(config: ModelConfig, num_classes: int) -> DeformableDETR:
    """Return a detector with the same fresh weights each time; copying is faster than building."""
    return copy.deepcopy(_built(config, num_classes))


def random_images(*sizes: tuple[int, int]) -> list[Tensor]:
    """Return float64 images of these (height, width)."""
    return [torch.randn(3, h, w, dtype=torch.float64) for h, w in sizes]


def group_of(outputs: DetectorOutput, name: str = "") -> GroupOutput:
    """Return the predictions of the one group of this name."""
    (found,) = [group for group in outputs["groups"] if group.name == name]
    return found
