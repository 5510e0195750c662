"""A corrected COCO-format copy of a split, and the list of what was changed."""

from collections.abc import Mapping
from typing import Any

from datasets.checks.ledger import Edit, Ledger

_SECTIONS = ("images", "annotations", "categories")


def corrected(ledger: Ledger) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the corrected content and every change: what, why, and the values before and after.

    File names stay relative to the split's image folder. What is sound stays as it is.
    """
    _drop_with_images(ledger)
    content = dict(ledger.source.content)
    changes: list[dict[str, Any]] = []
    for section in _SECTIONS:
        kept = []
        for position, entry in enumerate(ledger.section(section)):
            edit = ledger.edits.get((section, position))
            if edit is not None:
                changes.append(_change(ledger.split, section, position, entry, edit))
            if edit is None or not edit.drop:
                kept.append({**entry, **edit.values} if edit else entry)
        content[section] = kept
    return content, changes


def _drop_with_images(ledger: Ledger) -> None:
    """Let annotations go with their image, those too that could not be put with it."""
    for image in ledger.images:
        edit = ledger.edits.get(("images", image.position))
        if edit is None or not edit.drop:
            continue
        for box in image.boxes:
            ledger.drop("annotations", box.position, edit.reasons[-1])


def _change(split: str, section: str, position: int, entry: object, edit: Edit) -> dict[str, Any]:
    """Return a change in plain values."""
    old = entry if isinstance(entry, Mapping) else {}
    told: dict[str, Any] = {
        "split": split, "section": section, "position": position, "id": old.get("id"),
        "why": list(dict.fromkeys(edit.reasons)),
    }  # fmt: skip
    if edit.drop:
        return {**told, "change": "left out", "entry": entry}
    old_values = {key: old[key] for key in edit.values if key in old}
    return {**told, "change": "set", "before": old_values, "after": edit.values}
