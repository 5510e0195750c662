"""Read a data set of any format into the content of a COCO-format file.

Flaws stay as they are: the checks of `datasets.checks.coco_json` are the same for all formats.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.checks.coco_json import load_json
from datasets.checks.findings import Finding
from datasets.formats.voc import read_voc
from datasets.formats.yolo import read_yolo
from util.errors import DataError

FORMATS = ("coco", "voc", "yolo")


@dataclass(frozen=True)
class Source:
    """A split of a data set, not checked.

    `content` is what a COCO-format file holds, its file names relative to `image_dir`; `place` is
    the file or folder to name in messages. `findings` tell what could not be read at all.
    """

    content: dict[str, Any]
    image_dir: Path
    place: Path
    findings: tuple[Finding, ...] = ()


def read_source(
    data_format: str,
    place: Path,
    split: str,
    *,
    image_dir: Path | None = None,
    voc_corners: str = "pixels",
) -> Source:
    """Read a split of a data set.

    `place` is the folder of the set (for YOLO its data.yaml will do too). A COCO-format set may be
    given as the annotation file and `image_dir` instead, whatever the split.

    Raises:
        DataError: what describes the set is missing or cannot be read; see each format's reader.
    """
    if data_format == "voc":
        content, images, findings = read_voc(place, split, voc_corners)
        return Source(content, images, place, tuple(findings))
    if data_format == "yolo":
        content, images, findings = read_yolo(place, split)
        return Source(content, images, place, tuple(findings))
    if image_dir is None:
        image_dir, place = coco_layout(place, split)
    require_folder(image_dir)
    return Source(load_json(place), image_dir, place)


def coco_layout(root: Path, split: str) -> tuple[Path, Path]:
    """Return the image folder and the annotation file of a split in COCO's own layout."""
    return root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"


def require_folder(image_dir: Path) -> None:
    """Raise DataError unless the folder of images is there."""
    if not image_dir.is_dir():
        raise DataError(f"{image_dir}: expected a folder of images, found none.")
