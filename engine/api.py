"""`evaluate` and `train` in one call; the command line does the same."""

import os
from typing import Any

from engine.detector import Detector


def evaluate(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    *,
    batch_size: int | None = None,
    precision: str = "fp32",
    **load: Any,
) -> dict[str, float]:
    """Return COCO's 12 numbers of a checkpoint by name; see `Detector.load` and `.evaluate`."""
    detector = Detector.load(source, **load)
    return detector.evaluate(images, annotations, batch_size=batch_size, precision=precision)
