"""A checked split of a data set of any format, in flat arrays."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Annotations, Images
from datasets.checks.coco_json import CocoContent, check_content
from datasets.checks.findings import Finding
from datasets.checks.images import clip_to_images, complete_sizes
from datasets.formats.sources import Source, require_folder
from datasets.index_cache import read_content
from util.classes import Classes
from util.errors import DataError

_CLASSES_SHOWN = 12


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """A split of a data set of any format, checked, in flat arrays.

    `annotations` are those that evaluation counts, as in the file. Training uses a part of them,
    clipped: image i has `boxes[first[i]:first[i + 1]]` ([B,4] xyxy pixels) with `labels` [B].
    `findings` tell everything that was repaired or left out; `place` is where the data came from.
    """

    place: Path
    image_dir: Path
    classes: Classes
    images: Images
    annotations: Annotations
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    first: NDArray[np.int64]
    findings: tuple[Finding, ...]

    @classmethod
    def load(
        cls, json_path: Path, image_dir: Path, *, need_boxes: bool, cache: bool = False
    ) -> "CocoIndex":
        """Read and check a COCO-format file and the folder of its images.

        With `cache`, the content of a large file is kept for the next time.

        Raises:
            DataError: see `require_folder`, `read_content` and `from_content`.
        """
        require_folder(image_dir)
        content = read_content(json_path, need_boxes=need_boxes, cache=cache)
        return cls.from_content(content, json_path, image_dir, need_boxes=need_boxes)

    @classmethod
    def from_source(cls, source: Source, *, need_boxes: bool) -> "CocoIndex":
        """Check what was read of a data set, and its images.

        Without `need_boxes` there may be no annotations (as test-dev has none).

        Raises:
            DataError: see `check_content` and `from_content`.
        """
        content = check_content(source.content, source.place, need_boxes=need_boxes)
        content = replace(content, findings=(*source.findings, *content.findings))
        return cls.from_content(content, source.place, source.image_dir, need_boxes=need_boxes)

    @classmethod
    def from_content(
        cls, content: CocoContent, place: Path, image_dir: Path, *, need_boxes: bool
    ) -> "CocoIndex":
        """Check content against the images.

        Raises:
            DataError: none of the images is in the folder, or there is no box to train on where
                `need_boxes`.
        """
        findings = list(content.findings)
        images = complete_sizes(content.images, image_dir, findings)
        boxes, usable = clip_to_images(content.annotations, images, findings)
        if need_boxes and not usable.any():
            noticed = "; ".join(finding.text for finding in findings)
            raise DataError(
                f"{place}: expected at least one usable box, got none among "
                f"{len(content.annotations.ids)} annotations. "
                + (f"Noticed: {noticed}." if findings else "Give another file.")
            )
        image = content.annotations.image[usable]
        order = np.argsort(image, kind="stable")
        first = np.searchsorted(image[order], np.arange(len(images.ids) + 1))
        empty = images.ids[np.diff(first) == 0]
        if len(empty) and len(content.annotations.ids):  # test-dev has none
            line = f"images without boxes: {len(empty)} of {len(images.ids)}, kept"
            findings.append(Finding("no_boxes", len(empty), line, "image", empty))
        return cls(
            place=place,
            image_dir=image_dir,
            classes=content.classes,
            images=images,
            annotations=content.annotations,
            boxes=boxes[usable][order],
            labels=content.annotations.labels[usable][order],
            first=first,
            findings=tuple(findings),
        )

    def __len__(self) -> int:
        return len(self.images.ids)

    @property
    def notices(self) -> list[str]:
        """A line on each kind of thing that was repaired or left out."""
        return [finding.text for finding in self.findings]

    @property
    def boxes_per_image(self) -> NDArray[np.int64]:
        """Usable boxes of each image."""
        return np.diff(self.first)

    def report(self, num_queries: int) -> str:
        """Return the summary and a line on everything that was mended or will not be found."""
        notices = self.notices
        crowded = self.boxes_per_image > num_queries
        if crowded.any():
            notices.append(
                f"{int(crowded.sum())} images have more boxes (up to "
                f"{int(self.boxes_per_image.max())}) than the model has queries "
                f"({num_queries}): the rest can never be found. Raise --num_queries."
            )
        return "\n".join([self.summary(), *(f"  notice: {notice}" for notice in notices)])

    def data_report(self) -> dict[str, Any]:
        """Return what was repaired or left out, in plain values, with the ids of each kind."""
        return {
            "place": str(self.place),
            "images": len(self),
            "boxes": len(self.boxes),
            "findings": [finding.to_json() for finding in self.findings],
        }

    def summary(self) -> str:
        """Return a line of counts and a line with the boxes of each class, most frequent first."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        shown = [f"{self.classes.names[k]} {counts[k]}" for k in order[:_CLASSES_SHOWN]]
        rest = len(self.classes) - len(shown)
        more = [f"{rest} more with {counts[order[_CLASSES_SHOWN:]].sum()}"] if rest else []
        return (
            f"{self.place.name}: {len(self)} images, {len(self.boxes)} boxes, "
            f"{int((self.boxes_per_image == 0).sum())} images without boxes, "
            f"{int(self.annotations.crowd.sum())} crowd boxes, {len(self.classes)} classes\n"
            f"  boxes by class: {', '.join([*shown, *more])}"
        )
