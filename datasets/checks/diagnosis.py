"""Examine the splits of a data set, and tell everything that is wrong with it."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets.checks.boxes import Limits, check_boxes
from datasets.checks.entries import read_entries
from datasets.checks.kinds import KINDS
from datasets.checks.ledger import XYWH, CheckedImage, Ledger, Offender
from datasets.checks.scan import scan
from datasets.class_mapping import map_used_classes
from datasets.formats.sources import Source
from datasets.images import TURNED, is_image
from util.classes import Classes
from util.errors import DataError


@dataclass(frozen=True)
class Diagnosis:
    """What was found in each split; `offenders` holds those of all, by kind in a fixed order."""

    ledgers: tuple[Ledger, ...]
    offenders: Mapping[str, list[Offender]]

    @property
    def healthy(self) -> bool:
        """Tell whether nothing but notes was found."""
        return all(KINDS[kind].note for kind in self.offenders)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a report."""
        return {
            "check": 1,
            "healthy": self.healthy,
            "splits": {ledger.split: _counts(ledger) for ledger in self.ledgers},
            "findings": [
                {
                    "kind": kind, "group": KINDS[kind].group, "note": KINDS[kind].note,
                    "count": len(found), "title": KINDS[kind].title,
                    "meaning": KINDS[kind].meaning, "training": KINDS[kind].training,
                    "fix": KINDS[kind].fix or None,
                    "offenders": [offender.to_json() for offender in found],
                }
                for kind, found in self.offenders.items()
            ],
        }  # fmt: skip


def boxes_by_class(ledger: Ledger) -> dict[int, int]:
    """Return how many usable boxes each category id has, the most first."""
    counts = Counter(box.category for p in ledger.images for box in p.usable_boxes)
    return {i: counts[i] for i in sorted(ledger.class_names, key=lambda i: (-counts[i], i))}


def names_by_class(ledger: Ledger) -> dict[int, str]:
    """Return what each category id is called, with the id where several share a name."""
    times = Counter(ledger.class_names.values())
    return {i: f"{name} ({i})" if times[name] > 1 else name
            for i, name in ledger.class_names.items()}  # fmt: skip


def _counts(ledger: Ledger) -> dict[str, Any]:
    by_class, names = boxes_by_class(ledger), names_by_class(ledger)
    return {
        "place": str(ledger.source.place),
        "images": len(ledger.section("images")),
        "annotations": len(ledger.section("annotations")),
        "usable_boxes": sum(by_class.values()),
        "boxes_by_class": {names[i]: count for i, count in by_class.items()},
    }


def examine(sources: Mapping[str, Source], limits: Limits, *, processes: int) -> Diagnosis:
    """Decode all images of the splits and check everything said of them."""
    ledgers = [Ledger(split, source) for split, source in sources.items()]
    for ledger in ledgers:
        read_entries(ledger)
    facts = scan((p.path for ledger in ledgers for p in ledger.images), processes=processes)
    for ledger in ledgers:
        for image in ledger.images:
            image.facts = facts[image.path]
            _check_image(ledger, image)
        check_boxes(ledger, limits)
        _check_duplicates(ledger)
    _check_leaks(ledgers)
    _check_unused(ledgers)
    _check_classes(ledgers)
    found = {kind: [o for ledger in ledgers for o in ledger.offenders.get(kind, ())]
             for kind in KINDS}  # fmt: skip
    return Diagnosis(tuple(ledgers), {kind: some for kind, some in found.items() if some})


def _check_image(ledger: Ledger, image: CheckedImage) -> None:
    """Note what is wrong with an image's file, and what the entry says of its size."""
    facts, stated = image.facts, image.stated
    if facts.state != "sound":
        kind = f"{facts.state}_image"
        ledger.tell_image(kind, image, facts.error)
        ledger.drop("images", image.position, kind)
        return
    assert facts.size is not None
    stored = facts.size
    turned = facts.orientation in TURNED
    upright = stored[::-1] if turned else stored
    if stated is None:
        ledger.tell_image("size_not_stated", image)
    elif stated not in (stored, upright):
        detail = f"stated {stated[1]} x {stated[0]}, is {stored[1]} x {stored[0]}"
        ledger.tell_image("wrong_size", image, detail)
    if stated not in (stored, upright):
        kind = "wrong_size" if stated else "size_not_stated"
        values = {"height": stored[0], "width": stored[1]}
        ledger.change("images", image.position, kind, values)
    if facts.orientation != 1:
        clear = turned and stored != upright and stated in (stored, upright)
        how = "upright" if stated == upright else "stored"
        detail = f"orientation {facts.orientation}" + (f", boxes on the {how} one" if clear else "")
        ledger.tell_image("exif_rotated" if clear else "exif_ambiguous", image, detail)


def _sound(ledger: Ledger) -> list[CheckedImage]:
    return [p for p in ledger.images if p.facts.state == "sound"]


def _check_duplicates(ledger: Ledger) -> None:
    """Note all but one of images with the same bytes; the one with the most boxes is kept."""
    copies: dict[bytes, list[CheckedImage]] = defaultdict(list)
    for image in _sound(ledger):
        copies[image.facts.digest].append(image)
    for same in copies.values():
        best = max(same, key=lambda image: len(image.usable_boxes))  # the first of equals
        for image in same:
            if image is not best:
                other = "" if _drawn(image) == _drawn(best) else ", with other boxes"
                detail = f"as {best.name!r} ({best.id}){other}"
                ledger.tell_image("duplicate_image", image, detail)
                ledger.drop("images", image.position, "duplicate_image")


def _drawn(image: CheckedImage) -> Counter[tuple[int, XYWH]]:
    return Counter((box.category, box.xywh) for box in image.boxes)


def _check_leaks(ledgers: list[Ledger]) -> None:
    """Note images of the first split that are in another one too."""
    for other in ledgers[1:]:
        names = {image.facts.digest: image.name for image in _sound(other)}
        for image in _sound(ledgers[0]):
            name = names.get(image.facts.digest)
            if name is not None:
                ledgers[0].tell_image("leak", image, f"as {name!r} of {other.split}")
                ledgers[0].drop("images", image.position, "leak")


def _check_unused(ledgers: list[Ledger]) -> None:
    used = {_real(image.path) for ledger in ledgers for image in ledger.images}
    searched: set[Path] = set()
    for ledger in ledgers:
        folder = ledger.source.image_dir
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            real = _real(path)
            if real not in used and real not in searched and is_image(path):
                ledger.tell("unused_file", path.relative_to(folder).as_posix())
            searched.add(real)


def _real(path: Path) -> Path:
    """Return a path by which the same place is known however it is named; links stay links."""
    return _real_folder(path.parent) / path.name


@lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> Path:
    return folder.resolve()


def _check_classes(ledgers: list[Ledger]) -> None:
    used = [{i for i, count in boxes_by_class(ledger).items() if count} for ledger in ledgers]
    for ledger, found in zip(ledgers, used, strict=True):
        by_name: dict[str, int] = {}
        for number, name in ledger.class_names.items():
            if number not in found:
                ledger.tell("empty_class", name, f"id {number}")
            if by_name.setdefault(name, number) != number:
                ledger.tell("repeated_name", name, f"ids {by_name[name]} and {number}")
    for ledger, found in zip(ledgers[1:], used[1:], strict=True):
        _compare_classes(ledgers[0], used[0], ledger, found)


def _compare_classes(first: Ledger, trained: set[int], other: Ledger, found: set[int]) -> None:
    """Note classes of another split that the first lacks, or has no box of, as training pairs them.

    `trained` and `found` are the category ids with boxes, of each split's own.
    """
    ours, annotated = _classes(first), _annotated(other)
    try:
        label_of = map_used_classes(_classes(other), ours, annotated)
    except DataError:
        lacking = [i for i in sorted(annotated) if other.class_names[i] not in ours.names]
        for number in lacking or sorted(annotated):
            other.tell("unknown_class", other.class_names[number], f"id {number}")
        return
    for number in sorted(found):
        if ours.ids[label_of[number]] not in trained:
            other.tell("unseen_class", other.class_names[number], f"id {number}")


def _annotated(ledger: Ledger) -> set[int]:
    """Return the categories with boxes that evaluation counts, usable or not."""
    return {box.category for image in ledger.images for box in image.boxes
            if box.flaw not in ("zero_bbox", "negative_bbox")}  # fmt: skip


def _classes(ledger: Ledger) -> Classes:
    ids = tuple(sorted(ledger.class_names))
    return Classes(ids, tuple(ledger.class_names[i] for i in ids))
