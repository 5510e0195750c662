"""A checked split of a data set of any format, in flat arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Annotations, Images
from datasets.checks.boxes import check_boxes, clip, has_area
from datasets.checks.entries import CocoContent, check_content
from datasets.checks.findings import Notice
from datasets.checks.images import check_headers
from datasets.checks.split_report import SplitReport
from datasets.formats.coco import require_folder
from datasets.formats.format import Source
from datasets.index_cache import read_content
from util.classes import Classes
from util.errors import DataError

_CLASSES_SHOWN = 12


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """A split of a data set of any format, checked, in flat arrays.

    `annotations` are those that evaluation counts, as in the file. Training uses a part of them,
    clipped: image i has `boxes[first[i]:first[i + 1]]` ([B,4] xyxy pixels) with `labels` [B].
    `findings` are all that was fixed or left out; `place` is where the data came from.
    """

    place: Path
    image_dir: Path
    classes: Classes
    images: Images
    annotations: Annotations
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    first: NDArray[np.int64]
    findings: tuple[Notice, ...]

    @classmethod
    def load(
        cls,
        json_path: Path,
        image_dir: Path | None,
        *,
        need_boxes: bool,
        cache: bool = False,
    ) -> "CocoIndex":
        """Read and check a COCO-format file and the folder of its images, if there is one.

        With `cache`, the content of a large file is kept for the next time.

        Raises:
            DataError: see `require_folder`, `read_content` and `from_content`.
        """
        if image_dir is not None:
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
        content = check_content(source, need_boxes=need_boxes)
        return cls.from_content(content, source.place, source.image_dir, need_boxes=need_boxes)

    @classmethod
    def from_content(
        cls, content: CocoContent, place: Path, image_dir: Path | None, *, need_boxes: bool
    ) -> "CocoIndex":
        """Check content against the images, unless their folder is None.

        Raises:
            DataError: none of the images is in the folder, or there is no box to train on although
                `need_boxes`.
        """
        report = SplitReport(Source({}, image_dir or Path(), place))
        report.classes, report.images = content.classes, content.images
        report.annotations = content.annotations
        if image_dir is not None:
            check_headers(report)
        check_boxes(report)
        notices = (*content.notices, *report.notices)
        # Training and evaluation take the numbers as they are, whatever layout they seem to have.
        annotations = content.annotations.with_area()
        size = report.images.sizes[annotations.image][:, ::-1].astype(np.float64)
        boxes = clip(annotations.xywh, size)
        usable = has_area(boxes) & ~annotations.crowd
        if need_boxes and not usable.any():
            raise DataError(
                f"{place}: none of the {len(content.annotations.ids)} annotations is a usable box. "
                + (
                    f"Found: {'; '.join(n.text for n in notices)}."
                    if notices
                    else "Use another file."
                )
            )
        image = annotations.image[usable]
        order = np.argsort(image, kind="stable")
        return cls(
            place=place,
            image_dir=report.source.image_dir,
            classes=content.classes,
            images=report.images,
            annotations=annotations,
            boxes=boxes[usable][order],
            labels=annotations.labels[usable][order],
            first=np.searchsorted(image[order], np.arange(len(report.images.ids) + 1)),
            findings=notices,
        )

    def __len__(self) -> int:
        return len(self.images.ids)

    @property
    def notices(self) -> list[str]:
        """A line on each kind of thing that was fixed or left out."""
        return [finding.text for finding in self.findings]

    @property
    def boxes_per_image(self) -> NDArray[np.int64]:
        """Usable boxes of each image."""
        return np.diff(self.first)

    def report(self, num_queries: int) -> str:
        """Return the summary and a line on everything that was fixed or cannot be detected."""
        notices = self.notices
        crowded = self.boxes_per_image > num_queries
        if crowded.any():
            notices.append(
                f"{int(crowded.sum())} images have more boxes (up to "
                f"{int(self.boxes_per_image.max())}) than the model has queries "
                f"({num_queries}): the rest can never be found. Raise `num_queries`."
            )
        return "\n".join([self.summary(), *(f"  notice: {notice}" for notice in notices)])

    def data_report(self) -> dict[str, Any]:
        """Return what was fixed or left out, in plain values, with the ids of each kind."""
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
