"""What the checks know of a split: its usable entries as arrays, and every flaw found in it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Annotations, BoolArray, FloatArray, Images, IntArray
from datasets.checks.findings import Finding, Findings, Notice
from datasets.checks.scan import FileFacts
from datasets.formats.format import Source
from util.classes import Classes

SECTIONS = ("images", "annotations", "categories")


@dataclass(eq=False)
class SplitReport:
    """The usable entries of a split, N images and A annotations, and what is wrong with it.

    `read_entries` sets `classes`, `images` and `annotations`, and their positions in the file as
    `image_rows` [N] and `annotation_rows` [A]. `check_files` notes what it knows of the files in
    `facts`, and puts the sizes that count into `images`. `check_boxes` judges each annotation:
    `xywh` [A,4] is in pixels, whatever the layout of the file; `flaw` [A] is why it is left out and
    `fixed` [A] why its numbers were changed, "" if not. `hidden` findings only follow from others:
    a corrected copy needs them, a reader does not.
    """

    source: Source
    split: str = ""
    findings: list[Findings] = field(default_factory=list)
    hidden: list[Findings] = field(default_factory=list)
    facts: dict[int, FileFacts] = field(default_factory=dict)
    classes: Classes = field(init=False)
    images: Images = field(init=False)
    annotations: Annotations = field(init=False)
    image_rows: IntArray = field(init=False)
    annotation_rows: IntArray = field(init=False)
    xywh: FloatArray = field(init=False)
    flaw: NDArray[np.object_] = field(init=False)
    fixed: NDArray[np.object_] = field(init=False)

    def section(self, name: str) -> list[Any]:
        """Return a list of the file, empty if it is missing."""
        found = self.source.content.get(name)
        return found if isinstance(found, list) else []

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What is kept of the findings while a run lasts."""
        return tuple(found.to_notice() for found in self.findings)

    def report(self, found: Findings) -> None:
        """Note all that have a flaw, if any has it."""
        if len(found):
            self.findings.append(replace(found, split=self.split))

    def report_places(self, kind: str, found: Sequence[Finding]) -> None:
        """Note flaws that are not of a usable image or annotation."""
        rows = np.arange(len(found))
        self.report(Findings(kind, rows, lambda row: (found[row].place, found[row].detail)))

    def report_images(
        self,
        kind: str,
        rows: Sequence[int],
        detail: Callable[[int], str] = lambda row: "",
        *,
        checked: int = 0,
    ) -> None:
        """Note a flaw of usable images, by their positions; `checked`: among how many, 0: all."""
        chosen = np.array(rows, dtype=np.int64)
        names = self.images.file_names
        self.report(
            Findings(
                kind,
                chosen,
                lambda row: (names[row], detail(row)),
                "images",
                usable=True,
                image_ids=self.images.ids[chosen],
                out_of=f" of {checked} checked" if checked else f" of {len(names)}",
            )
        )

    def report_boxes(
        self, kind: str, chosen: BoolArray, detail: Callable[[int], str] | None = None
    ) -> None:
        """Note a flaw of the usable annotations `chosen` [A]."""
        rows, found, names = np.flatnonzero(chosen), self.annotations, self.images.file_names
        self.report(
            Findings(
                kind,
                rows,
                lambda row: (names[found.image[row]], (detail or self.numbers)(row)),
                "annotations",
                usable=True,
                image_ids=self.images.ids[found.image[rows]],
                annotation_ids=found.ids[rows],
            )
        )

    def numbers(self, row: int) -> str:
        """Return the four numbers of a box as in the file."""
        return f"[{', '.join(f'{value:g}' for value in self.annotations.xywh[row].tolist())}]"

    @cached_property
    def _by_image(self) -> tuple[IntArray, IntArray]:
        order = np.argsort(self.annotations.image, kind="stable")
        images = np.arange(len(self.images.ids) + 1)
        return order, np.searchsorted(self.annotations.image[order], images)

    def boxes_of(self, image: int) -> IntArray:
        """Return the positions of an image's annotations."""
        order, first = self._by_image
        return order[first[image] : first[image + 1]]

    def path(self, image: int) -> Path:
        """Return the file of an image, by its position in `images`."""
        return self.source.image_dir / self.images.file_names[image]

    @property
    def sound(self) -> BoolArray:
        """Which images [N] can be decoded, as far as they were looked at."""
        damaged = [i for i, facts in self.facts.items() if facts.state != "sound"]
        sound = np.ones(len(self.images.ids), dtype=np.bool_)
        sound[damaged] = False
        return sound

    @property
    def usable(self) -> BoolArray:
        """Which annotations [A] to train on: none of an image that cannot be decoded."""
        fine = np.asarray(self.flaw == "", dtype=np.bool_)
        return fine & ~self.annotations.crowd & self.sound[self.annotations.image]

    def boxes_per_image(self) -> IntArray:
        """Return how many usable boxes each image has [N]."""
        return np.bincount(self.annotations.image[self.usable], minlength=len(self.images.ids))

    def boxes_by_class(self) -> dict[int, int]:
        """Return how many usable boxes each category id has, the most first."""
        counts = np.bincount(self.annotations.labels[self.usable], minlength=len(self.classes))
        by_id = zip(self.classes.ids, counts.tolist(), strict=True)
        return dict(sorted(by_id, key=lambda item: (-item[1], item[0])))

    def class_names(self) -> dict[int, str]:
        """Return what each category id is called, on one line and with nothing invisible."""
        return dict(zip(self.classes.ids, map(printable, self.classes.names), strict=True))

    def unique_class_names(self) -> dict[int, str]:
        """Return what each category id is called, with the id if several share a name."""
        names = self.class_names()
        times = Counter(names.values())
        return {i: f"{name} ({i})" if times[name] > 1 else name for i, name in names.items()}


def printable(text: str) -> str:
    """Return text with escapes for what no terminal shows."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
