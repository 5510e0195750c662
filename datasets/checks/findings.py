"""What is known of a split while it is checked, and everything found wrong with it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Annotations, BoolArray, FloatArray, Images, IntArray
from datasets.checks.kinds import KINDS
from datasets.formats.coco_pieces import Pieces
from datasets.formats.registry import Source
from datasets.images import TURNED
from util.classes import Classes
from util.console import LONGEST_NAME, short_name

SECTIONS = ("images", "annotations", "categories")
NAMED = 3  # examples in a line
_LISTED = 1000  # ids or places in a report of training, which of whole sets would be megabytes


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file holds. `size` is (height, width) as stored, None without a readable header.

    `state` is missing, unreadable (does not open), truncated (opens, does not decode) or sound, as
    far as it was read; `digest` is a hash of the bytes, `orientation` the EXIF tag (1: as stored),
    `error` says what is wrong, and `small` is a small grey version, if it was asked for.
    """

    state: str = "missing"
    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes = b""
    error: str = ""
    small: bytes = b""

    @property
    def possible_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes that an entry may state: as stored, and after the EXIF orientation."""
        if self.size is None:
            return ()
        return (self.size, self.size[::-1] if self.orientation in TURNED else self.size)

    def contradicts(self, height: int, width: int) -> bool:
        """Return whether an entry states another size than the file has."""
        return self.size is not None and (height, width) not in self.possible_sizes


class Partner(NamedTuple):
    """The other image of a pair."""

    split: str
    place: str
    image_id: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing with a flaw: the image file or place in the annotation file, and its ids."""

    place: str
    detail: str = ""
    image_id: int | None = None
    annotation_id: int | None = None
    split: str = ""
    partner: Partner | None = None

    def __str__(self) -> str:
        number = "" if self.annotation_id is None else f"annotation {self.annotation_id}"
        return " ".join(filter(None, (repr(self.place), number, self.detail)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without those that are not known."""
        values = {
            "split": self.split,
            "place": self.place,
            "image_id": self.image_id,
            "annotation_id": self.annotation_id,
            "detail": self.detail or None,
            "partner": self.partner and self.partner._asdict(),
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Findings:
    """All findings of one kind in a split, each made when it is asked for.

    `rows` [N] are positions in a section of the annotation file, or in the arrays of usable images
    or annotations if `usable`; without a section they only count. Ids are [N], if known.
    """

    kind: str
    rows: IntArray
    describe: Callable[[int], tuple[str, str]] = lambda row: ("", "")  # row -> place, detail
    section: str = ""
    usable: bool = False
    image_ids: IntArray | None = None
    annotation_ids: IntArray | None = None
    out_of: str = ""  # how many there are in all
    split: str = ""
    partner: Callable[[int], Partner | None] = lambda row: None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Finding]:
        unknown = [None] * len(self)
        for row, image_id, annotation_id in zip(
            self.rows.tolist(),
            unknown if self.image_ids is None else self.image_ids.tolist(),
            unknown if self.annotation_ids is None else self.annotation_ids.tolist(),
            strict=True,
        ):
            yield Finding(
                *self.describe(row), image_id, annotation_id, self.split, self.partner(row)
            )

    def to_notice(self) -> "Notice":
        """Return what is kept while a run lasts."""
        kind = KINDS[self.kind]
        examples = first_few(map(str, islice(self, NAMED)), len(self))
        text = f"{kind.title}: {len(self)}{self.out_of} ({examples}); training {kind.training}"
        if self.annotation_ids is not None:
            where: dict[str, list[Any]] = {"annotation_ids": self.annotation_ids[:_LISTED].tolist()}
        elif self.image_ids is not None:
            where = {"image_ids": self.image_ids[:_LISTED].tolist()}
        else:
            where = {"places": [finding.place for finding in islice(self, _LISTED)]}
        return Notice(self.kind, len(self), text, where)


@dataclass(frozen=True)
class Notice:
    """All flaws of one kind: how many, a line with the first few, and where the first 1,000 are.

    `where` is a list of `image_ids`, of `annotation_ids`, or of `places`: files (and lines), or
    positions in a section of the annotation file.
    """

    kind: str
    count: int
    text: str
    where: Mapping[str, list[Any]]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a report."""
        return {"kind": self.kind, "count": self.count, "text": self.text, **self.where}


@dataclass(eq=False)
class SplitReport:
    """The usable entries of a split, N images and A annotations, and what is wrong with it.

    `read_entries` sets `classes`, `images` and `annotations`, and their positions in the file as
    `image_rows` [N] and `annotation_rows` [A]. `check_files` notes what it knows of the files in
    `facts`, and puts the sizes that count into `images`. `check_boxes` judges each annotation:
    `xywh` [A,4] is in pixels, whatever the layout of the file; `flaw` [A] is why it is left out and
    `fixed` [A] why its numbers were changed, "" if not; `trained` [A] is whether training takes it,
    with the numbers that the file has. `hidden` findings only follow from others:
    a corrected copy needs them, a reader does not.

    `interpret` sets `read`, the sections as they are meant, from those of the file; `text_ids`, by
    section the numbers of ids that are text; and `dropped`, rows of annotations to leave out.
    """

    source: Source
    split: str = ""
    findings: list[Findings] = field(default_factory=list)
    hidden: list[Findings] = field(default_factory=list)
    facts: dict[int, FileFacts] = field(default_factory=dict)
    read: dict[str, Sequence[Any]] = field(default_factory=dict)
    text_ids: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    classes: Classes = field(init=False)
    images: Images = field(init=False)
    annotations: Annotations = field(init=False)
    image_rows: IntArray = field(init=False)
    annotation_rows: IntArray = field(init=False)
    xywh: FloatArray = field(init=False)
    flaw: NDArray[np.object_] = field(init=False)
    fixed: NDArray[np.object_] = field(init=False)
    trained: BoolArray = field(init=False)

    def section(self, name: str) -> Sequence[Any]:
        """Return a list of the file as it is meant, empty if it is missing."""
        return self.read[name] if name in self.read else self.given(name)

    def given(self, name: str) -> Sequence[Any]:
        """Return a list of the file, empty if it is missing."""
        found = self.source.content.get(name)
        return found if isinstance(found, (list, Pieces)) else []

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What is kept of the findings while a run lasts."""
        return tuple(found.to_notice() for found in self.findings)

    def report(self, found: Findings) -> None:
        """Note all that have a flaw, if any has it."""
        if len(found):
            self.findings.append(replace(found, split=self.split))

    def report_places(self, kind: str, found: Sequence[tuple[str, str]]) -> None:
        """Note flaws that are not of a usable image or annotation: (place, detail) of each."""
        self.report(Findings(kind, np.arange(len(found)), found.__getitem__))

    def report_images(
        self,
        kind: str,
        rows: Sequence[int] | IntArray,
        detail: Callable[[int], str] = lambda row: "",
        *,
        checked: int = 0,
        partner: Callable[[int], Partner | None] = lambda row: None,
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
                partner=partner,
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
    def rows_by_image(self) -> list[IntArray]:
        """Positions of each image's annotations [N]."""
        order = np.argsort(self.annotations.image, kind="stable")
        image = self.annotations.image[order]
        return np.split(order, np.searchsorted(image, np.arange(1, len(self.images.ids))))

    def path(self, image: int) -> Path:
        """Return the file of an image, by its position in `images`."""
        return self.source.image_dir / self.images.file_names[image]

    @property
    def sound(self) -> BoolArray:
        """Which images [N] can be decoded, as far as they were looked at."""
        unsound = [i for i, facts in self.facts.items() if facts.state != "sound"]
        return ~np.isin(np.arange(len(self.images.ids)), unsound)

    @property
    def usable(self) -> BoolArray:
        """Which annotations [A] a corrected copy has, of images that can be decoded."""
        found = self.annotations
        return np.asarray(self.flaw == "") & ~found.crowd & self.sound[found.image]

    @property
    def num_trained(self) -> int:
        """How many boxes training takes."""
        return int(self.trained.sum())

    def boxes_per_image(self) -> IntArray:
        """Return how many boxes training takes of each image [N]."""
        return np.bincount(self.annotations.image[self.trained], minlength=len(self.images.ids))

    def boxes_by_class(self) -> dict[int, int]:
        """Return how many boxes training takes of each category id, the most first."""
        counts = np.bincount(self.annotations.labels[self.trained], minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")  # ids are in order
        return {self.classes.ids[k]: int(counts[k]) for k in order}

    def class_names(self) -> dict[int, str]:
        """Return what each category id is called, on one line and with nothing invisible."""
        return dict(zip(self.classes.ids, map(short_name, self.classes.names), strict=True))

    def boxes_by_name(self) -> dict[str, int]:
        """Return the same by what each class is called, with the id if several share a name."""
        names = self.class_names()
        times = Counter(names.values())
        return {
            f"{names[i]} ({i})" if times[names[i]] > 1 else names[i]: count
            for i, count in self.boxes_by_class().items()
        }


def first_few(names: Iterable[str], total: int | None = None) -> str:
    """Return the first names of many, with dots where there are more."""
    listed = list(names)
    more = ", ..." if (len(listed) if total is None else total) > NAMED else ""
    shown = [n if len(n) <= LONGEST_NAME else f"{n[:LONGEST_NAME]}…" for n in listed[:NAMED]]
    return ", ".join(shown) + more
