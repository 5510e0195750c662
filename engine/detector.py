"""A detector from a checkpoint of any kind, and the options that came with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.load import Given
from configs.schema import ModelConfig
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.weights.load import Pretrained, load_pretrained
from models.weights.transfer import load_strict
from util.errors import CheckpointError, ConfigError


def load_detector(
    source: str, device: torch.device, *, ema: bool = True
) -> tuple[DeformableDETR, Pretrained, Sequence[float], Sequence[float]]:
    """Load a checkpoint of any kind; return the model, its origin, and mean and deviation.

    `ema`: averaged weights, where it has them.

    Raises:
        ConfigError: no source is given.
        CheckpointError: it cannot be read, or does not tell what model it is of.
    """
    if not source:
        raise ConfigError("--checkpoint: expected a file, a Hugging Face folder or hf:NAME.")
    pretrained = load_pretrained(source, ema=ema)
    if "backbone" not in pretrained.model_options:
        raise CheckpointError(
            f"{source}: expected weights that tell their backbone, got some without options whose "
            "backbone is no torchvision ResNet. Use the whole checkpoint they come from."
        )
    options = saved_options(Given(), {"model": pretrained.model_options}, source)
    model = build_model(options.section("model", ModelConfig), num_classes=len(pretrained.classes))
    load_strict(model, pretrained.state_dict, source)
    mean = pretrained.image_mean or model.backbone.mean
    std = pretrained.image_std or model.backbone.std
    return model.to(device).eval(), pretrained, mean, std


def saved_options(given: Given, values: Mapping[str, Any], source: str) -> Given:
    """Return options as a checkpoint holds them, for others that are given on top.

    Raises:
        CheckpointError: one is unknown here, or of another type.
    """
    try:
        return given.saved(values, source)
    except ConfigError as error:
        what = str(error).partition(" Known: ")[0]
        raise CheckpointError(f"{what} If a later version has saved it, use that one.") from error


def saved_data_options(pretrained: Pretrained) -> dict[str, Any]:
    """Return the data options that a checkpoint carries."""
    if pretrained.config is not None:
        section = {"data": pretrained.config.get("data", {})}  # others may be of a later version
        return dict(saved_options(Given(), section, pretrained.source).values["data"])
    if pretrained.image_size is not None:
        return dict(zip(("eval_scale", "max_size"), pretrained.image_size, strict=True))
    return {}


def beside(source: str) -> Path:
    """Return the folder of a checkpoint.

    Raises:
        ConfigError: it lies on the hub.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"--output_dir: expected a folder for the results of {source}.")
    return path if path.is_dir() else path.parent
