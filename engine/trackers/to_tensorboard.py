"""Curves for TensorBoard, in the folder tensorboard/ of a run."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from engine.trackers import TRACKERS


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Event files; those of later steps than the one that a run continues from are hidden."""

    def __init__(self, folder: Path, since: int | None) -> None:
        if str(folder) != os.fsencode(folder).decode("utf-8", "ignore"):
            raise ValueError(f"{folder}: no TensorBoard files, which need UTF-8")
        # Imported on use: it takes a second
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=since)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """See `Tracker`."""
        pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker`."""
        with contextlib.suppress(OSError):  # its file was removed, and another begun
            self._writer.close()
