"""What was found wrong: one thing with a flaw, all with a kind of flaw, and what is kept of it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from datasets.arrays import IntArray
from datasets.checks.kinds import KINDS

NAMED = 3  # examples in a line
_LONGEST = 180  # characters of one: a name may be anything, a whole file in base64 too


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing with a flaw: the image file or place in the annotation file, and its ids."""

    place: str
    detail: str = ""
    image_id: int | None = None
    annotation_id: int | None = None
    split: str = ""

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
    describe: Callable[[int], tuple[str, str]]  # row -> place, detail
    section: str = ""
    usable: bool = False
    image_ids: IntArray | None = None
    annotation_ids: IntArray | None = None
    out_of: str = ""  # how many there are in all
    split: str = ""

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
            yield Finding(*self.describe(row), image_id, annotation_id, self.split)

    def to_notice(self) -> "Notice":
        """Return what is kept while a run lasts: counts and ids, and a line with the first few."""
        kind = KINDS[self.kind]
        examples = first_few(map(str, islice(self, NAMED)), len(self))
        text = f"{kind.title}: {len(self)}{self.out_of} ({examples}); training {kind.training}"
        if self.annotation_ids is not None:
            return Notice(self.kind, len(self), text, "annotation", self.annotation_ids)
        if self.image_ids is not None:
            return Notice(self.kind, len(self), text, "image", self.image_ids)
        if self.section:
            return Notice(self.kind, len(self), text, self.section, self.rows)
        places = tuple(finding.place for finding in self)
        return Notice(self.kind, len(self), text, places=places)


@dataclass(frozen=True, eq=False)
class Notice:
    """One kind of flaw in a data set: a line to read, and where it is.

    `ids` [N] are ids of what `of` says, "image" or "annotation", or positions in a section of the
    annotation file; `places` name files (and lines).
    """

    kind: str
    count: int
    text: str
    of: str = ""
    ids: IntArray | None = None
    places: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a report."""
        value: dict[str, Any] = {"kind": self.kind, "count": self.count, "text": self.text}
        if self.ids is None:
            return {**value, "places": list(self.places)}
        if self.of in ("image", "annotation"):
            return {**value, f"{self.of}_ids": self.ids.tolist()}
        return {**value, "places": [f"{self.of}[{row}]" for row in self.ids.tolist()]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Notice":
        """Read what `to_json` wrote."""
        for of in ("image", "annotation"):
            if f"{of}_ids" in value:
                ids = np.array(value[f"{of}_ids"], dtype=np.int64)
                return cls(value["kind"], value["count"], value["text"], of, ids)
        return cls(value["kind"], value["count"], value["text"], places=tuple(value["places"]))


def first_few(names: Iterable[str], total: int | None = None) -> str:
    """Return the first names of many, with dots where there are more."""
    listed = list(names)
    more = ", ..." if (len(listed) if total is None else total) > NAMED else ""
    shown = [n if len(n) <= _LONGEST else f"{n[:_LONGEST]}…" for n in listed[:NAMED]]
    return ", ".join(shown) + more
