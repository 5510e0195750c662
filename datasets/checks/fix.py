"""A corrected COCO-format copy of a split, and the list of what was changed."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets.checks.entries import is_area
from datasets.checks.findings import SECTIONS, SplitReport
from datasets.checks.kinds import KINDS

_NEW_AREA = ("normalised_bbox", "xyxy_bbox", "cxcywh_bbox")  # the old one is of other numbers
_NEW_IDS = {"no_annotation_id", "repeated_annotation"}
# Kinds whose entries are kept, with other values.
_KEPT = {
    *_NEW_AREA,
    *_NEW_IDS,
    *("wrong_size", "size_not_stated", "missing_key", "past_edge", "one_based", "zero_based"),
}


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
            old = entry if isinstance(entry, Mapping) else {}
            if not edit.drop:
                content[section].append({**old, **edit.values} if edit.reasons else entry)
            if edit.reasons:
                change: dict[str, Any] = {"change": "left out", "entry": entry}
                if not edit.drop:
                    before = {key: old[key] for key in edit.values if key in old}
                    change = {"change": "set", "before": before, "after": edit.values}
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
            height, width = report.images.sizes[i].tolist()
            image.values = {"height": height, "width": width}
    return edits


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
    if fixed:
        values["bbox"] = [round(value, 6) for value in box]
    if not is_area(entry.get("area")) or fixed in _NEW_AREA:
        values["area"] = round(whole, 6)
    elif fixed:
        values["area"] = round(min(entry["area"], whole), 6)
    return values
