"""What a check notes of a split: flaws found, and what a corrected copy would change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.checks.scan import FileFacts
from datasets.formats.sources import Source
from datasets.images import TURNED

Size = tuple[int, int]
XYWH = tuple[float, float, float, float]


@dataclass(slots=True)
class Box:
    """An annotation of a usable image and class; `xywh` in pixels once its layout is known.

    `flaw` is why it is left out, `mended` why its numbers were changed; "" where neither.
    """

    position: int
    id: int
    category: int
    raw: XYWH
    xywh: XYWH
    crowd: bool
    area: float | None
    flaw: str = ""
    mended: str = ""


@dataclass(slots=True)
class CheckedImage:
    """An entry of `images` that has an id of its own; sizes are (height, width) in pixels."""

    position: int
    id: int
    name: str
    path: Path
    stated: Size | None
    facts: FileFacts = field(default_factory=FileFacts)
    boxes: list[Box] = field(default_factory=list)

    @property
    def size(self) -> Size | None:
        """The size of what training uses, None where neither file nor entry tells."""
        stored = self.facts.size
        if stored is None or (self.facts.orientation in TURNED and self.stated == stored[::-1]):
            return self.stated
        return stored

    @property
    def usable_boxes(self) -> list[Box]:
        """The boxes to train on: none where the file cannot be decoded."""
        if self.facts.state != "sound":
            return []
        return [box for box in self.boxes if not box.flaw and not box.crowd]


@dataclass(frozen=True, slots=True)
class Offender:
    """One thing with a flaw: the image file or place in the annotation file, and its ids."""

    split: str
    place: str
    image_id: int | None = None
    annotation_id: int | None = None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without those there are none of."""
        values = {
            "split": self.split, "place": self.place, "image_id": self.image_id,
            "annotation_id": self.annotation_id, "detail": self.detail or None,
        }  # fmt: skip
        return {key: value for key, value in values.items() if value is not None}


@dataclass(slots=True)
class Edit:
    """What a corrected copy does with an entry: leaves it out, or sets `values`; and why."""

    reasons: list[str] = field(default_factory=list)
    drop: bool = False
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ledger:
    """The flaws of one split by kind, and the edits that mend them by section and position."""

    split: str
    source: Source
    images: list[CheckedImage] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)
    offenders: dict[str, list[Offender]] = field(default_factory=dict)
    edits: dict[tuple[str, int], Edit] = field(default_factory=dict)

    def section(self, name: str) -> list[Any]:
        """Return a list of the file, empty where it is missing."""
        found = self.source.content.get(name)
        return found if isinstance(found, list) else []

    def tell(self, kind: str, place: str, detail: str = "", **ids: int) -> None:
        """Note a flaw."""
        offender = Offender(self.split, place, detail=detail, **ids)
        self.offenders.setdefault(kind, []).append(offender)

    def tell_image(self, kind: str, image: CheckedImage, detail: str = "") -> None:
        """Note a flaw of an image."""
        self.tell(kind, image.name, detail, image_id=image.id)

    def tell_box(self, kind: str, image: CheckedImage, box: Box, detail: str = "") -> None:
        """Note a flaw of a box."""
        numbers = ", ".join(f"{value:g}" for value in box.raw)
        self.tell(
            kind, image.name, detail or f"[{numbers}]", image_id=image.id, annotation_id=box.id
        )

    def drop(self, section: str, position: int, kind: str) -> None:
        """Leave an entry out of a corrected copy."""
        edit = self.edits.setdefault((section, position), Edit())
        edit.drop = True
        edit.reasons.append(kind)

    def change(self, section: str, position: int, kind: str, values: Mapping[str, Any]) -> None:
        """Set keys of an entry in a corrected copy."""
        edit = self.edits.setdefault((section, position), Edit())
        edit.values.update(values)
        edit.reasons.append(kind)

    def drops(self, section: str, position: int) -> bool:
        """Tell whether a corrected copy leaves an entry out."""
        edit = self.edits.get((section, position))
        return edit is not None and edit.drop
