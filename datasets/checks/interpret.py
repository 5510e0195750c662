"""Read entries as the tools that wrote them meant them: numbers as text, text as ids, flags.

What is changed here is reported, with a count; the file's own entries stay as they are.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from datasets.checks.findings import Findings, SplitReport
from datasets.checks.values import column, is_whole, to_box, to_flag, to_number, to_whole
from datasets.formats.coco_pieces import Pieces

_IGNORED = {"crowd": "ignored_as_crowd", "drop": "ignored_dropped", "keep": "ignored_kept"}


def interpret(report: SplitReport) -> None:
    """Set what the report's sections say, with `text_ids`; see `SplitReport`."""
    images, categories, annotations = (
        _Section(report, name) for name in ("images", "categories", "annotations")
    )
    in_pieces = isinstance(annotations.given, Pieces)  # nothing of theirs is to be changed
    for section in (images, categories, annotations):
        table = {} if in_pieces and section is annotations else _number_ids(section)
        report.text_ids[section.name] = table
    _read_sizes(images)
    _find_file_names(images)
    if not in_pieces:
        for key, section in (("image_id", images), ("category_id", categories)):
            _resolve(annotations, key, section, report.text_ids[section.name])
        _read_numbers(annotations)
        _read_flags(annotations, report)
    for section in (images, categories, annotations):
        section.finish()


class _Section:
    """A section of the file, whose entries are copied before they change."""

    def __init__(self, report: SplitReport, name: str) -> None:
        self.report, self.name = report, name
        self.given: Sequence[Any] = report.section(name)
        self.entries = self.given
        self._own: list[Any] | None = None  # once one has changed
        self._keys: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))

    def set(self, kind: str, row: int, key: str, value: Any) -> None:
        """Give an entry another value, for a reason that is a kind of finding."""
        self.note(kind, row, key)
        self.change(row, key, value)

    def change(self, row: int, key: str, value: Any) -> None:
        """Give an entry another value."""
        if self._own is None:
            self.entries = self._own = list(self.given)
        if self._own[row] is self.given[row]:
            self._own[row] = dict(self.given[row])
        self._own[row][key] = value

    def note(self, kind: str, row: int, key: str) -> None:
        """Report an entry that stays as it is, for what it has under a key."""
        self._keys[kind][row].append(key)

    def finish(self) -> None:
        """Report what was changed, and why."""
        self.report.read[self.name] = self.entries
        for kind, keys in self._keys.items():
            self._finish(kind, keys)

    def _finish(self, kind: str, keys: Mapping[int, list[str]]) -> None:
        def describe(row: int) -> tuple[str, str]:
            found = (f"{key} {self.given[row].get(key)!r:.60}" for key in keys[row])
            return f"{self.name}[{row}]", ", ".join(found)

        self.report.report(Findings(kind, np.array(sorted(keys)), describe, self.name))


def _number_ids(section: _Section) -> dict[str, int]:
    """Turn ids that are text into numbers; return those of texts that are not just a number.

    "12" is 12. "012" is 12 too, if that is nobody else's; any other text gets an unused number.
    """
    values = column(section.entries, "id")
    if str not in set(map(type, values)):
        return {}
    taken = {int(value) for value in values if is_whole(value)}
    texts = {row: v.strip() for row, v in enumerate(values) if isinstance(v, str) and v.strip()}
    plain = {text: n for text in texts.values() if (n := to_whole(text)) is not None}
    taken |= {n for text, n in plain.items() if text == str(n)}
    table: dict[str, int] = {}
    for text in dict.fromkeys(texts.values()):
        number = plain.get(text)
        if number is not None and text != str(number) and number not in taken:
            table[text] = number
            taken.add(number)
    unused = (number for number in count(1) if number not in taken)
    for row, text in texts.items():
        if text not in table and text != str(plain.get(text)):
            table[text] = next(unused)
        kind = "text_id" if text in table else "text_number"
        section.set(kind, row, "id", table[text] if text in table else plain[text])
    return table


def _resolve(section: _Section, key: str, owner: _Section, table: Mapping[str, int]) -> None:
    """Turn references that are text into the ids of the entries they mean."""
    values = column(section.entries, key)
    if str not in set(map(type, values)):
        return
    names: Mapping[str, int] | None = None
    for row, value in enumerate(values):
        text = value.strip() if isinstance(value, str) else ""
        if not text:
            continue
        if text in table:
            section.set("text_id", row, key, table[text])
        elif (number := to_whole(text)) is not None:
            section.set("text_number", row, key, number)
        else:
            names = _by_name(owner) if names is None else names
            if text in names:
                section.set("text_id", row, key, names[text])


def _by_name(section: _Section) -> dict[str, int]:
    """Return the ids of entries by what they are called, where only one is called so."""
    ids: dict[str, set[int]] = defaultdict(set)
    for entry in section.entries:
        if isinstance(entry, Mapping) and is_whole(entry.get("id")):
            for name in _names(entry):
                ids[name].add(int(entry["id"]))
    return {name: next(iter(own)) for name, own in ids.items() if len(own) == 1}


def _names(entry: Mapping[str, Any]) -> Iterable[str]:
    if isinstance(entry.get("name"), str):  # a category's
        yield entry["name"].strip()
    if isinstance(entry.get("file_name"), str):  # an image's
        path = PurePosixPath(entry["file_name"])
        yield from (entry["file_name"], path.name, path.stem)


def _read_sizes(images: _Section) -> None:
    for key in ("height", "width"):
        for row, value in _texts(images, key):
            if (number := to_number(value)) is not None:
                images.set("text_number", row, key, number)


def _find_file_names(images: _Section) -> None:
    """Take the address of an image as its name where it has no other, as in LVIS."""
    for row, entry in enumerate(images.entries):
        if isinstance(entry, Mapping) and not entry.get("file_name"):
            address = entry.get("coco_url")
            if isinstance(address, str) and address:
                images.set("name_from_url", row, "file_name", address)


def _read_numbers(annotations: _Section) -> None:
    boxes = column(annotations.entries, "bbox")
    kinds = set(map(type, boxes))
    lists = (box for box in boxes if isinstance(box, list))
    if str in kinds or str in set(map(type, chain.from_iterable(lists))):
        for row, box in enumerate(boxes):
            is_text = isinstance(box, str) or (isinstance(box, list) and str in map(type, box))
            if is_text and (numbers := to_box(box)) is not None:
                annotations.set("text_number", row, "bbox", numbers)
    for row, value in _texts(annotations, "area"):
        if (area := to_number(value)) is not None:
            annotations.set("text_number", row, "area", area)


def _texts(section: _Section, key: str) -> list[tuple[int, str]]:
    """Return what is text under a key, with its rows."""
    values = column(section.entries, key)
    if str not in set(map(type, values)):
        return []
    return [(row, value) for row, value in enumerate(values) if isinstance(value, str)]


def _read_flags(annotations: _Section, report: SplitReport) -> None:
    for row, value in _texts(annotations, "iscrowd"):
        if (flag := to_flag(value)) is not None:
            annotations.set("text_number", row, "iscrowd", flag)
    if report.source.reading.crowd == "as_objects":
        for row, value in enumerate(column(annotations.entries, "iscrowd")):
            if value == 1:
                annotations.set("crowd_as_object", row, "iscrowd", 0)
    _read_ignored(annotations, report)


def _read_ignored(annotations: _Section, report: SplitReport) -> None:
    values = column(annotations.entries, "ignore")
    if set(map(type, values)) == {type(None)}:
        return
    meaning = report.source.reading.ignore_key
    for row, value in enumerate(values):
        ignored = (to_flag(value) if isinstance(value, str) else value) == 1
        if not ignored or annotations.entries[row].get("iscrowd") == 1:
            continue
        annotations.note(_IGNORED[meaning], row, "ignore")
        if meaning == "crowd":
            annotations.change(row, "iscrowd", 1)
        elif meaning == "drop":
            report.dropped.add(row)
