"""Exported files beside the checkpoint they were made of, on the same images in turn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.benchmark.measure import time_in_turn
from engine.detector import Detector
from engine.exported.model import ExportedModel
from models.queries import DetectorOutput
from util.batch import PaddedBatch
from util.errors import ConfigError
from util.files import short_names


def open_files(sources: Sequence[str], beside: Detector) -> dict[str, Detector]:
    """Return exported files by short names.

    Raises:
        CheckpointError: one cannot be opened.
        ConfigError: one is not an exported file, is of a model with other classes, or the
            checkpoint is on another device than the files.
    """
    if sources and beside.device.type != "cpu":
        raise ConfigError(
            f"exported: these files run on the CPU, and the checkpoint on {beside.device}. "
            "Add `device cpu`."
        )
    names = short_names([Path(source) for source in sources])
    files = {}
    for name, source in zip(names, sources, strict=True):
        files[name] = Detector.load(source, device="cpu")
        if not isinstance(files[name].network, ExportedModel):
            raise ConfigError(
                f"exported {source}: is not an exported file. Write one with `main.py export`."
            )
        if files[name].classes.names != beside.classes.names:
            raise ConfigError(
                f"exported {source}: has other classes than the checkpoint. Export that one."
            )
    return files


def timed_beside(
    detector: Detector,
    files: Mapping[str, Detector],
    batch: PaddedBatch,
    common: Mapping[str, Any],
) -> dict[str, Any]:
    """Time forward passes in turn, and say how far the files' scores are apart.

    The checkpoint computes in float32, files as they were exported.

    Scores are those of the detections of an image, which are compared by rank.
    """
    outputs: dict[str, DetectorOutput] = {}
    detectors = {"checkpoint": detector, **files}

    def call(name: str) -> Any:
        @torch.inference_mode()
        def forward() -> None:
            outputs[name] = detectors[name].network(batch)

        return forward

    times = dict(zip(detectors, time_in_turn([call(n) for n in detectors], **common), strict=True))
    expected = _scores(detector, outputs["checkpoint"], batch)
    return {
        "batch_size": len(batch.images),
        "checkpoint": times["checkpoint"].to_json(),
        "files": {
            name: {
                "runtime": _runtime(file),
                **times[name].to_json(),
                "times_as_fast": times["checkpoint"].median / times[name].median,
                "largest_difference_of_scores": _apart(
                    expected, _scores(file, outputs[name], batch)
                ),
            }
            for name, file in files.items()
        },
    }


def _runtime(file: Detector) -> str:
    assert isinstance(file.network, ExportedModel)
    half = file.network.about.precision == "fp16"
    return file.network.session.runtime + (" (fp16)" if half else "")


def _scores(detector: Detector, outputs: DetectorOutput, batch: PaddedBatch) -> list[Tensor]:
    """Return the scores of each image's detections, best first."""
    found = detector.postprocess(outputs, torch.tensor(batch.sizes))
    return [one["scores"].float() for one in found]


def _apart(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference of scores of a rank that both have."""
    counts = [min(len(a), len(b)) for a, b in zip(expected, found, strict=True)]
    return max(
        (
            float((a[:k] - b[:k]).abs().max())
            for a, b, k in zip(expected, found, counts, strict=True)
            if k
        ),
        default=0.0,
    )
