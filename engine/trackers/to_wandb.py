"""Curves at Weights & Biases."""

import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from engine.trackers import TRACKERS, keep_id, kept_id, options_of
from util.errors import ConfigError

try:
    import wandb
except ImportError:
    raise ConfigError(
        "log_to wandb: its package is not installed. Install it: pip install wandb"
    ) from None

_PROJECT = "deformable-detr"


@TRACKERS.register("wandb")
class WeightsAndBiases:
    """A run of the project in WANDB_PROJECT; its other variables hold, as WANDB_MODE=offline does.

    A resumed run is continued. Steps that it repeats keep their first values.
    """

    def __init__(self, folder: Path, since: int | None) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            dir=str(folder),
            config=options_of(folder),
            id=kept_id(folder, "wandb") if since else None,
            resume="allow",
        )
        keep_id(folder, "wandb", self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """See `Tracker`."""
        self._run.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
