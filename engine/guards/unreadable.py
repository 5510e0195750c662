"""Images that cannot be read: named once each, and listed in the run's data report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.guards.guard import Guard
from util.batch import Batch, UnreadableImage
from util.console import log
from util.files import write_atomic
from util.world import World

_KEY = "unreadable_in_training"


class UnreadableImages(Guard):
    """Names each image that cannot be read once, and keeps them by path."""

    def __init__(self) -> None:
        self.images: dict[str, UnreadableImage] = {}

    def before_step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        for batch in micro_batches:
            self.report(batch)

    def report(self, batch: Batch) -> None:
        """Print the batch's unreadable images that were not printed before."""
        for image in batch.unreadable:
            if image.path not in self.images:
                self.images[image.path] = image
                log.warning(
                    f"image {image.image_id} '{image.path}' cannot be read ({image.reason}) and "
                    "is skipped."
                )


def write_data_report(path: Path, report: Mapping[str, Any], *, continued: bool) -> None:
    """Write what was found in the data of a run; a `continued` one keeps its unreadable images."""
    if continued and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))["train"].get(_KEY)
        if before:
            report = {**report, "train": {**report["train"], _KEY: before}}
    write_atomic(path, json.dumps(report, indent=1))


def list_unreadable(path: Path, unreadable: UnreadableImages, world: World) -> int:
    """Add the images that any process could not read to the data report; return their number."""
    gathered = world.gather(unreadable.images)
    found = {image.path: asdict(image) for images in gathered for image in images.values()}
    if world.main and path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        before = report["train"].get(_KEY, [])  # from before a resume
        found = {image["path"]: image for image in before} | found
        if found:
            report["train"][_KEY] = sorted(found.values(), key=lambda image: image["image_id"])
            write_atomic(path, json.dumps(report, indent=1))
    return len(found)
