"""`data_report.json` of a run: what was fixed or left out of its data, then what cannot be read."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from util.batch import UnreadableImage
from util.files import write_atomic
from util.world import World

DATA_REPORT = "data_report.json"
_UNREADABLE = "unreadable_in_training"  # key of the training split


def write_data_report(folder: Path, report: Mapping[str, Any], *, continued: bool) -> None:
    """Write what was found in the data, by split, into the folder of a run.

    A `continued` run keeps the unreadable images of its earlier part.
    """
    path = folder / DATA_REPORT
    if continued and path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))["train"].get(_UNREADABLE)
        if earlier:
            report = {**report, "train": {**report["train"], _UNREADABLE: earlier}}
    write_atomic(path, json.dumps(report, indent=1))


def report_unreadable(folder: Path, images: Mapping[str, UnreadableImage], world: World) -> int:
    """Add the images, by path, that any process could not read; return how many there are in all.

    All processes must call it. Those but the main one return 0.
    """
    found = {
        path: asdict(image)
        for of_process in world.gather(images)
        for path, image in of_process.items()
    }
    path = folder / DATA_REPORT
    if world.main and path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        earlier = report["train"].get(_UNREADABLE, [])  # from before a resume
        found = {image["path"]: image for image in earlier} | found
        if found:
            report["train"][_UNREADABLE] = sorted(found.values(), key=lambda i: i["image_id"])
            write_atomic(path, json.dumps(report, indent=1))
    return len(found)
