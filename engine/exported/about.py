"""What an exported file says about itself: all that turns images into named boxes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from util.classes import Classes
from util.errors import CheckpointError

KEY = "deformable_detr"  # of the text in the file's metadata
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch_export": ".pt2"}  # by format
_LAYOUT = 1


@dataclass(frozen=True)
class About:
    """The companion of a graph.

    `data` and `tiles` hold values of these options, `mean` and `std` are per channel in 0..1,
    `thresholds` has the best score threshold by class name. With `finished`, post-processing is in
    the graph, and `num_select` detections come out for each image. `precision` is that of the heavy
    layers; inputs and outputs are float32 in any case.
    """

    classes: Classes
    data: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    thresholds: Mapping[str, float]
    batch_size: int
    num_queries: int
    finished: bool
    num_select: int
    tiles: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"

    def to_text(self) -> str:
        """Return the text that a file carries, in ASCII."""
        content = {**vars(self), "layout": _LAYOUT, "classes": self.classes.to_json()}
        return json.dumps(content)

    @classmethod
    def from_text(cls, text: str | None, source: str) -> "About":
        """Read what `to_text` wrote.

        Raises:
            CheckpointError: the file carries none, a damaged one, or that of another version.
        """
        if text is None:
            raise CheckpointError(
                f"{source}: was not written by `export` of this program: its classes and image "
                "size are unknown. Export the checkpoint here."
            )
        try:
            content = json.loads(text)
            if content.pop("layout") != _LAYOUT:
                raise CheckpointError(
                    f"{source}: was exported by another version of this program. Export the "
                    "checkpoint again."
                )
            return cls(
                classes=Classes.from_json(content["classes"]),
                data=dict(content["data"]),
                mean=tuple(float(value) for value in content["mean"]),
                std=tuple(float(value) for value in content["std"]),
                thresholds={str(k): float(v) for k, v in content["thresholds"].items()},
                batch_size=int(content["batch_size"]),
                num_queries=int(content["num_queries"]),
                finished=bool(content["finished"]),
                num_select=int(content["num_select"]),
                tiles=dict(content.get("tiles", {})),
                precision=str(content.get("precision", "fp32")),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{source}: what it says about its classes and images is damaged "
                f"({type(error).__name__}: {error}). Export the checkpoint again."
            ) from error
