"""Examine the splits of a data set: everything that is wrong with it, and a corrected copy."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datasets.checks.alike import check_alike
from datasets.checks.boxes import Limits, check_boxes, check_learning
from datasets.checks.entries import read_entries
from datasets.checks.findings import SECTIONS, FileFacts, Finding, SplitReport
from datasets.checks.images import check_files, scan
from datasets.checks.kinds import KINDS
from datasets.checks.names import find_files
from datasets.checks.values import is_area
from datasets.class_mapping import map_used_classes
from datasets.formats.layout import files_below, folded
from datasets.formats.registry import Source
from datasets.images import is_image
from util.console import short_name
from util.errors import DataError

_NEW_AREA = ("normalised_bbox", "xyxy_bbox", "cxcywh_bbox")  # the old one is of other numbers
_BETWEEN_WORDS = re.compile(r"[\s_-]+")
_NEW_IDS = {"no_annotation_id", "repeated_annotation"}
_MEANT = {  # of what is read in another way than it is written
    *("text_number", "text_id", "matched_name", "name_from_url"),
    *("crowd_as_object", "ignored_as_crowd"),
}
# Kinds whose entries are kept, with other values.
_KEPT = {
    *_NEW_AREA,
    *_NEW_IDS,
    *_MEANT,
    *("computed_bbox", "wrong_size", "size_not_stated", "missing_key"),
    *("past_edge", "one_based", "zero_based"),
}


@dataclass(frozen=True)
class Diagnosis:
    """What was found in each split; `findings` holds those of all, by kind in a fixed order."""

    splits: tuple[SplitReport, ...]
    findings: Mapping[str, list[Finding]]

    @property
    def healthy(self) -> bool:
        """Whether nothing but notes was found."""
        return all(KINDS[kind].note for kind in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a report."""
        return {
            "check": 1,
            "healthy": self.healthy,
            "splits": {
                report.split: {
                    "place": str(report.source.place),
                    "images": len(report.section("images")),
                    "annotations": len(report.section("annotations")),
                    "usable_boxes": report.num_trained,
                    "boxes_by_class": report.boxes_by_name(),
                }
                for report in self.splits
            },
            "findings": [
                {
                    "kind": kind,
                    "group": KINDS[kind].group,
                    "note": KINDS[kind].note,
                    "count": len(found),
                    "title": KINDS[kind].title,
                    "meaning": KINDS[kind].meaning,
                    "training": KINDS[kind].training,
                    "fix": KINDS[kind].fix or None,
                    "offenders": [finding.to_json() for finding in found],
                }
                for kind, found in self.findings.items()
            ],
        }


def examine(
    sources: Mapping[str, Source], limits: Limits, *, processes: int, similar: bool = True
) -> Diagnosis:
    """Decode all images of the splits and check everything their entries say.

    With `similar`, images that look alike are searched for.
    """
    splits = [SplitReport(source, split) for split, source in sources.items()]
    paths: dict[str, dict[int, Path]] = {}
    missing: dict[str, dict[int, FileFacts]] = {}
    for report in splits:
        read_entries(report)
        missing[report.split] = find_files(report)
        there = set(range(len(report.images.ids))).difference(missing[report.split])
        paths[report.split] = {i: report.path(i) for i in sorted(there)}
    files = chain.from_iterable(p.values() for p in paths.values())
    scanned = scan(files, processes=processes, small=similar)
    for report in splits:
        facts = {i: scanned[path] for i, path in paths[report.split].items()}
        facts |= missing[report.split]
        _check_orientation(report, facts)
        check_files(report, facts)
        check_boxes(report)
        check_learning(report, limits)
        _check_duplicates(report)
        _check_classes(report)
        _check_spellings(report)
    _check_unused(splits)
    for other in splits[1:]:
        _check_leaks(splits[0], other)
        _compare_classes(splits[0], other)
    if similar:
        check_alike(splits)
    found: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for some in chain.from_iterable(report.findings for report in splits):
        found[some.kind] += some
    return Diagnosis(tuple(splits), {kind: some for kind, some in found.items() if some})


def _check_orientation(report: SplitReport, facts: Mapping[int, FileFacts]) -> None:
    """Report images that viewers turn, by whether the stated size shows how boxes were drawn."""
    clear, unclear = {}, {}
    for i, of_file in facts.items():
        if of_file.state == "sound" and of_file.orientation != 1:
            detail = f"orientation {of_file.orientation}"
            stored, upright = of_file.possible_sizes
            stated = tuple(report.images.sizes[i].tolist())
            if stored != upright and stated in (stored, upright):
                clear[i] = (
                    f"{detail}, boxes on the {'upright' if stated == upright else 'stored'} one"
                )
            else:
                unclear[i] = detail
    report.report_images("exif_rotated", list(clear), clear.__getitem__)
    report.report_images("exif_ambiguous", list(unclear), unclear.__getitem__)


def _check_duplicates(report: SplitReport) -> None:
    """Report all but one of images with the same bytes; the one with the most boxes is kept."""
    copies: dict[bytes, list[int]] = defaultdict(list)
    for i in np.flatnonzero(report.sound).tolist():
        copies[report.facts[i].digest].append(i)
    counts = report.boxes_per_image()
    detail = {}
    for same in copies.values():
        best = max(same, key=lambda i: counts[i])  # the first of equals
        kept = f"as {report.images.file_names[best]!r} ({report.images.ids[best]})"
        for i in same:
            if i != best:
                alike = _drawn(report, i) == _drawn(report, best)
                detail[i] = kept if alike else f"{kept}, with other boxes"
    report.report_images("duplicate_image", list(detail), detail.__getitem__)


def _drawn(report: SplitReport, image: int) -> Counter[tuple[float, ...]]:
    rows = report.rows_by_image[image]
    boxes = np.column_stack([report.annotations.labels[rows], report.xywh[rows]]).tolist()
    return Counter(map(tuple, boxes))


def _check_leaks(train: SplitReport, other: SplitReport) -> None:
    """Report images of the first split that are in another one too."""
    names = {
        other.facts[i].digest: other.images.file_names[i]
        for i in np.flatnonzero(other.sound).tolist()
    }
    detail = {
        i: f"as {names[train.facts[i].digest]!r} of {other.split}"
        for i in np.flatnonzero(train.sound).tolist()
        if train.facts[i].digest in names
    }
    train.report_images("leak", list(detail), detail.__getitem__)


def _check_unused(splits: list[SplitReport]) -> None:
    """Report images that no split names; links stay links, under any name of their folder."""
    used = {
        _resolve(path.parent) / path.name
        for report in splits
        for path in map(report.path, range(len(report.images.ids)))
    }
    for report in splits:
        folder, unused = report.source.image_dir, []
        for path in _searched(report.source):
            real = _resolve(path.parent) / path.name
            if real not in used and is_image(path):
                unused.append((path.relative_to(folder).as_posix(), ""))
                used.add(real)
        report.report_places("unused_file", unused)


def _searched(source: Source) -> list[Path]:
    """Return all that is in the folders of images; what only lies above them is not searched."""
    if source.folders:
        there = filter(os.path.isdir, source.folders)  # false for a name that no folder can have
        return sorted(path for folder in there for path in folder.glob("*"))
    return sorted(files_below(source.image_dir))


@lru_cache(maxsize=4096)
def _resolve(folder: Path) -> Path:
    return folder.resolve()


def _check_classes(report: SplitReport) -> None:
    names, counts = report.class_names(), report.boxes_by_class()
    report.report_places(
        "empty_class",
        [(name, f"id {number}") for number, name in names.items() if not counts[number]],
    )
    whole = dict(zip(report.classes.ids, report.classes.names, strict=True))
    first = {name: number for number, name in reversed(whole.items())}
    report.report_places(
        "repeated_name",
        [
            (names[number], f"ids {first[name]} and {number}")
            for number, name in whole.items()
            if first[name] != number
        ],
    )


def _check_spellings(report: SplitReport) -> None:
    """Report names of classes that are another's in another spelling."""
    first: dict[str, str] = {}
    alike = []
    for name in dict.fromkeys(report.classes.names):
        other = first.setdefault(_BETWEEN_WORDS.sub("", folded(name)), name)
        if other != name:
            alike.append((short_name(name), f"as {short_name(other)!r}"))
    report.report_places("alike_name", alike)


def _compare_classes(train: SplitReport, other: SplitReport) -> None:
    """Report classes of another split that the first one lacks or has no box of."""
    annotated = {other.classes.ids[k] for k in np.unique(other.annotations.with_area().labels)}
    names = other.class_names()
    try:
        label_of = map_used_classes(other.classes, train.classes, annotated)
    except DataError:
        whole = dict(zip(other.classes.ids, other.classes.names, strict=True))
        lacking = [i for i in sorted(annotated) if whole[i] not in train.classes.names]
        other.report_places(
            "unknown_class", [(names[i], f"id {i}") for i in lacking or sorted(annotated)]
        )
        return
    trained = train.boxes_by_class()
    other.report_places(
        "unseen_class",
        [
            (names[i], f"id {i}")
            for i, count in sorted(other.boxes_by_class().items())
            if count and not trained[train.classes.ids[label_of[i]]]
        ],
    )


@dataclass(slots=True)
class _Edit:
    """What a corrected copy does with an entry: leaves it out, or sets `values`; and why."""

    reasons: list[str] = field(default_factory=list)
    drop: bool = False
    values: dict[str, Any] = field(default_factory=dict)


def corrected(report: SplitReport) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the corrected content and every change: what, why, and the values before and after.

    File names stay relative to the split's image folder. What is sound stays as it is.
    """
    edits = _edits(report)
    content = dict(report.source.content)
    changes: list[dict[str, Any]] = []
    for section in SECTIONS:
        content[section] = []
        for row, entry in enumerate(report.section(section)):
            edit = edits.get((section, row), _Edit())
            given = report.given(section)[row]
            old = given if isinstance(given, Mapping) else {}
            if not edit.drop:
                content[section].append({**entry, **edit.values} if edit.reasons else entry)
            if edit.reasons:
                change: dict[str, Any] = {"change": "left out", "entry": given}
                if not edit.drop:
                    after = {**_new_values(old, entry), **edit.values}
                    before = {key: old[key] for key in after if key in old}
                    change = {"change": "set", "before": before, "after": after}
                changes.append(
                    {
                        "split": report.split,
                        "section": section,
                        "position": row,
                        "id": old.get("id"),
                        "why": list(dict.fromkeys(edit.reasons)),
                        **change,
                    }
                )
    return content, changes


def _new_values(given: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an entry has otherwise than the file."""
    return {key: v for key, v in read.items() if key not in given or given[key] is not v}


def _edits(report: SplitReport) -> dict[tuple[str, int], _Edit]:
    """Return what to do with entries, by section and position."""
    edits: dict[tuple[str, int], _Edit] = defaultdict(_Edit)
    rows_of = {"images": report.image_rows, "annotations": report.annotation_rows}
    for found in (*report.findings, *report.hidden):
        if found in report.hidden or (found.section and KINDS[found.kind].fix):
            rows = rows_of[found.section][found.rows] if found.usable else found.rows
            for row in rows.tolist():
                edit = edits[found.section, row]
                edit.reasons.append(found.kind)
                edit.drop |= found.kind not in _KEPT
    for i, row in enumerate(report.annotation_rows.tolist()):
        if ("annotations", row) in edits:
            edit = edits["annotations", row]
            edit.drop |= report.flaw[i] != ""
            edit.values = _values(report, i, row, edit.reasons)
    for i, row in enumerate(report.image_rows.tolist()):
        image = edits.get(("images", row))
        if image is not None and image.drop:
            why = next(kind for kind in reversed(image.reasons) if kind not in _KEPT)
            for box in report.annotation_rows[report.rows_by_image[i]].tolist():
                edits["annotations", box].drop = True
                edits["annotations", box].reasons.append(why)
        elif image is not None:
            image.values = _image_values(report, i, image.reasons)
    return edits


def _image_values(report: SplitReport, i: int, reasons: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if not {"wrong_size", "size_not_stated"}.isdisjoint(reasons):
        values["height"], values["width"] = report.images.sizes[i].tolist()
    if not {"matched_name", "name_from_url"}.isdisjoint(reasons):
        values["file_name"] = report.images.file_names[i]
    return values


def _values(report: SplitReport, i: int, row: int, reasons: list[str]) -> dict[str, Any]:
    """Return the values of annotation `i` that differ from those of its entry, at `row`."""
    entry, fixed = report.section("annotations")[row], report.fixed[i]
    values: dict[str, Any] = {}
    if not _NEW_IDS.isdisjoint(reasons):
        values["id"] = int(report.annotations.ids[i])
    if entry.get("iscrowd") not in (0, 1):
        values["iscrowd"] = 0
    box = report.xywh[i].tolist()
    whole = box[2] * box[3]
    if fixed or "computed_bbox" in reasons:
        values["bbox"] = [round(value, 6) for value in box]
    if not is_area(entry.get("area")) or fixed in _NEW_AREA:
        values["area"] = round(whole, 6)
    elif fixed:
        values["area"] = round(min(entry["area"], whole), 6)
    return values
