"""`data_report.json` of a run: what was fixed or left out of its data, then what cannot be read."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from util.batch import UnreadableImage
from util.files import read_regular, write_atomic
from util.world import World

DATA_REPORT = "data_report.json"
_UNREADABLE = "unreadable_in_training"  # key of the training split
_LARGEST = 2**30  # bytes


def write_data_report(folder: Path, report: Mapping[str, Any], *, continued: bool) -> None:
    """Write what was found in the data, by split, into the folder of a run.

    A `continued` run keeps the unreadable images of its earlier part.
    """
    path = folder / DATA_REPORT
    earlier = _unreadable_before(_read(path)) if continued else []
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
        report = _read(path)
        earlier = _unreadable_before(report)  # from before a resume
        found = {image["path"]: image for image in earlier} | found
        if found:
            report["train"][_UNREADABLE] = sorted(found.values(), key=lambda i: i["image_id"])
            write_atomic(path, json.dumps(report, indent=1))
    return len(found)


def split_counts(folder: Path) -> dict[str, tuple[int, int]]:
    """Return how many (images, boxes) a run's data had by split, as far as its folder says."""
    counts = {}
    for split, report in _read(folder / DATA_REPORT).items():
        found = report if isinstance(report, dict) else {}
        images, boxes = found.get("images"), found.get("boxes")
        if type(images) is int and type(boxes) is int:
            counts[split] = images, boxes
    return counts


def _read(path: Path) -> dict[str, Any]:
    """Return a data report; one without content where the file is missing or damaged."""
    try:
        report = json.loads(read_regular(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        report = None
    sound = isinstance(report, dict) and isinstance(report.get("train"), dict)
    return report if sound else {"train": {}}


def _unreadable_before(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the unreadable images that a report lists, but for damaged entries."""
    listed = report["train"].get(_UNREADABLE)
    return [
        image
        for image in (listed if isinstance(listed, list) else [])
        if isinstance(image, dict)
        and isinstance(image.get("path"), str)
        and type(image.get("image_id")) is int
    ]
