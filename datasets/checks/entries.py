"""Read the entries of a COCO-format file into flat arrays, and report what cannot be used."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datasets.arrays import Annotations, BoolArray, FloatArray, Images, IntArray, Names
from datasets.checks.findings import SECTIONS, Findings, Notice, SplitReport
from datasets.checks.interpret import interpret
from datasets.checks.masks import box_around
from datasets.checks.values import LIMIT, is_area, is_number, is_whole
from datasets.formats.coco_pieces import Pieces, Unsuitable
from datasets.formats.others import looks_like
from datasets.formats.registry import Reading, Source
from util.classes import Classes
from util.errors import DataError

_NO_BOX = [float("nan")] * 4
_ADDRESSES = ("coco_url", "flickr_url")
_MAY_BE_TEXT = ("id", "image_id", "category_id", "area", "iscrowd", "bbox")
_LONGEST_ADDRESS = 500  # characters


@dataclass(frozen=True, eq=False)
class CocoContent:
    """What a COCO-format file says, without the entries that cannot be used; see `notices`.

    `source` has the place and the folder of images of a set of another format.
    """

    classes: Classes
    images: Images
    annotations: Annotations
    notices: tuple[Notice, ...]
    source: tuple[Path, Path] | None = None


def check_content(source: Source, *, need_boxes: bool) -> CocoContent:
    """Check the content of a split as far as that needs no image.

    Without `need_boxes`, `annotations` may be missing.

    Raises:
        DataError: a section is missing or has nothing usable, category ids are missing or repeat,
            or boxes are fractions.
    """
    place = source.place
    for key in ("images", "categories", *(["annotations"] if need_boxes else [])):
        if not isinstance(source.content.get(key), (list, Pieces)):
            raise DataError(
                f"{place}: there is no list `{key}`. Use a COCO-format file of object instances."
                f"{looks_like(place)}"
            )
        if not source.content[key] and key != "annotations":
            raise DataError(f"{place}: `{key}` is empty.")
    report = SplitReport(source)
    read_entries(report)
    pixels = source.findings.get("pixel_values", ())
    if pixels and len(pixels) >= len(source.content.get("annotations") or ()):
        where, what = pixels[0]
        raise DataError(
            f"{where}: {what}: values above 1, here and in {len(pixels)} lines. Are they pixels? "
            "YOLO has fractions of the image: divide by its width and height."
        )
    for found in report.findings:
        if found.kind == "bad_category":
            first = next(iter(found))
            raise DataError(
                f"{place}: {first.place} has {first.detail}. "
                "Every category needs a unique whole number as `id`."
            )
    if not len(report.images.ids):
        raise DataError(
            f"{place}: no image in `images` can be used. "
            f"Found: {'; '.join(notice.text for notice in report.notices)}."
        )
    with_area = report.annotations.with_area().xywh
    if with_area.size and with_area.max() <= 1 and (with_area % 1).any():
        raise DataError(
            f"{place}: boxes are fractions from 0 to 1, but must be x, y, width, height in pixels. "
            "Multiply them by the image's width and height."
        )
    notices = tuple(n for n in report.notices if n.kind != "missing_section")  # there is no need
    return CocoContent(report.classes, report.images, report.annotations, notices)


def read_entries(report: SplitReport) -> None:
    """Fill a report with the usable images, boxes and classes, and report all others."""
    report.report_places(
        "missing_section", [(name, "") for name in SECTIONS if not report.section(name)]
    )
    for kind, found in report.source.findings.items():
        report.report_places(kind, found)
    interpret(report)
    _read_categories(report)
    _read_annotations(report, left_out=_read_images(report))


def _report_entries(
    report: SplitReport,
    kind: str,
    section: str,
    rows: Sequence[int] | IntArray,
    key: str,
    image_ids: IntArray | None = None,
) -> None:
    """Report entries by their positions in a section, with what they have under `key`."""

    def describe(row: int) -> tuple[str, str]:
        entry = report.section(section)[row]
        found = f"{key} {entry.get(key)!r:.80}" if isinstance(entry, Mapping) else f"{entry!r:.60}"
        return f"{section}[{row}]", found

    report.report(
        Findings(kind, np.array(rows, dtype=np.int64), describe, section, image_ids=image_ids)
    )


def _read_categories(report: SplitReport) -> None:
    names: dict[int, str] = {}
    bad, unnamed = [], []
    text_of = {number: text for text, number in report.text_ids["categories"].items()}
    root = _root_category(report)
    _report_entries(report, "root_category", "categories", root, "name")
    for row, entry in enumerate(report.section("categories")):
        if row in root:
            continue
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if is_whole(number) and number not in names:
            names[int(number)] = str(entry.get("name") or text_of.get(number, int(number)))
            unnamed += [] if entry.get("name") else [row]
        else:
            bad.append(row)
    _report_entries(report, "no_name", "categories", unnamed, "id")
    _report_entries(report, "bad_category", "categories", bad, "id")
    ids = tuple(sorted(names))
    texts = tuple(text_of.get(i, "") for i in ids)
    report.classes = Classes(ids, tuple(names[i] for i in ids), texts if any(texts) else ())


def _root_category(report: SplitReport) -> list[int]:
    """Return the position of the category that only holds the others, as Roboflow writes it."""
    entries = [e for e in report.section("categories") if isinstance(e, Mapping)]
    above = {str(e.get("supercategory")) for e in entries} - {"none"}
    roots = [e for e in entries if e.get("supercategory") == "none"]
    if len(roots) != 1 or above != {str(roots[0].get("name"))}:
        return []
    number = roots[0].get("id")
    annotations = report.section("annotations")
    if any(isinstance(a, Mapping) and a.get("category_id") == number for a in annotations):
        return []
    return [report.section("categories").index(roots[0])]


def _read_images(report: SplitReport) -> set[int]:
    """Set the images that have a unique id and a name; where its file is, `find_files` says.

    Returns the ids of entries that are left out.
    """
    entries = report.section("images")
    kept: dict[int, int] = {}  # id -> position
    flawed: dict[str, list[int]] = defaultdict(list)
    left_out: set[int] = set()
    ambiguous: list[int] = []
    for row, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if not is_whole(number):
            flawed["no_image_id"].append(row)
            continue
        number = int(number)
        name = entry.get("file_name")
        if not isinstance(name, str):
            flawed["no_file_name"].append(row)
            left_out.add(number)
        elif number in kept:
            flawed["repeated_image"].append(row)
            if entries[kept[number]]["file_name"] != name:
                ambiguous.append(number)
        else:
            kept[number] = row
    for kind, rows in sorted(flawed.items()):
        numbered = kind != "no_image_id"
        ids = np.array([entries[row]["id"] for row in rows], dtype=np.int64) if numbered else None
        _report_entries(report, kind, "images", rows, "file_name" if numbered else "id", ids)
    left_out = (left_out - kept.keys()).union(ambiguous)
    gone = [kept.pop(number) for number in dict.fromkeys(ambiguous)]
    report.hidden.append(
        Findings("repeated_image", np.array(gone, dtype=np.int64), section="images")
    )
    used = [entries[row] for row in kept.values()]
    stated = [(entry.get("height"), entry.get("width")) for entry in used]
    sizes = [s if all(is_number(side) and side >= 1 for side in s) else (0, 0) for s in stated]
    report.images = Images(
        np.array(list(kept), dtype=np.int64),
        Names.of(entry["file_name"] for entry in used),
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        {number: text for text, number in report.text_ids["images"].items() if number in kept},
        _addresses(used),
    )
    report.image_rows = np.array(list(kept.values()), dtype=np.int64)
    return left_out


def _addresses(entries: Sequence[Mapping[str, Any]]) -> Names:
    """Return where images came from, if that ends otherwise than their names; else nothing."""
    found = []
    for entry in entries:
        name = entry["file_name"].replace("\\", "/").rpartition("/")[2]
        given = (entry.get(key) for key in _ADDRESSES)
        texts = (a for a in given if isinstance(a, str) and len(a) <= _LONGEST_ADDRESS)
        found.append("\n".join(a for a in texts if a.rpartition("/")[2] != name))
    return Names.of(found if any(found) else ())


def _read_annotations(report: SplitReport, left_out: set[int]) -> None:
    """Set the annotations that have an image, a class and a box."""
    listed = report.section("annotations")
    if isinstance(listed, Pieces):
        rows = np.arange(len(listed))
        columns = Columns.concatenate(listed.parts)
    else:
        is_object = np.array([isinstance(entry, Mapping) for entry in listed], dtype=np.bool_)
        _report_entries(report, "not_an_object", "annotations", np.flatnonzero(~is_object), "")
        rows = np.flatnonzero(is_object)
        columns = Columns.of([listed[row] for row in rows.tolist()])
    ids = _number(report, columns, rows)
    image = _look_up(report.images.ids, columns.image_id, columns.has_image_id)
    with_image = (image < 0) & columns.has_image_id
    with_image &= np.isin(columns.image_id, list(left_out))  # reported there
    label = _look_up(
        np.array(report.classes.ids, dtype=np.int64), columns.category_id, columns.has_category_id
    )
    area, xywh = columns.area, columns.xywh
    names = report.images.file_names

    def report_some(
        kind: str, chosen: BoolArray, detail: Callable[[Mapping[str, Any]], str]
    ) -> None:
        def describe(row: int) -> tuple[str, str]:
            i = int(np.searchsorted(rows, row))
            name = names[image[i]] if image[i] >= 0 else f"annotations[{row}]"
            return name, detail(listed[row])

        report.report(
            Findings(
                kind,
                rows[chosen],
                describe,
                "annotations",
                image_ids=report.images.ids[image[chosen]] if (image[chosen] >= 0).all() else None,
                annotation_ids=ids[chosen],
            )
        )

    report_some(
        "unknown_image_id",
        (image < 0) & ~with_image,
        lambda e: f"image_id {e.get('image_id')!r:.40}",
    )
    report.hidden.append(Findings("image_left_out", rows[with_image], section="annotations"))
    report_some(
        "unknown_category_id",
        (image >= 0) & (label < 0),
        lambda e: f"category_id {e.get('category_id')!r:.40}",
    )
    _report_shifted(report, np.unique(columns.category_id[columns.has_category_id & (image >= 0)]))
    usable = (image >= 0) & (label >= 0)
    report_some("missing_key", usable & (np.isnan(area) | columns.no_crowd), _lacking)
    computed = usable & columns.computed
    report_some("computed_bbox", computed, lambda e: f"bbox {e.get('bbox')!r:.80}")
    report_some("rotated_bbox", usable & ~computed & columns.rotated, _rotation)
    broken = np.isnan(xywh).any(axis=1)
    report_some("broken_bbox", usable & broken, lambda e: f"bbox {e.get('bbox')!r:.80}")
    kept = usable & ~broken
    if report.dropped:
        kept &= ~np.isin(rows, list(report.dropped))
    report.annotation_rows = rows[kept]
    area = np.where(np.isnan(area), xywh[:, 2] * xywh[:, 3], area)
    report.annotations = Annotations(ids, image, label, xywh, area, columns.crowd).select(kept)


def _report_shifted(report: SplitReport, used: IntArray) -> None:
    """Report that category ids seem to be one less or one more than those of the categories.

    Then some are none of these, and all would be after the same step.
    """
    known = report.classes.ids
    if report.source.findings.get("one_based_class") or np.isin(used, known).all():
        return
    for step, word in ((1, "less"), (-1, "more")):
        if np.isin(used + step, known).all():
            detail = (
                f"ids from {used.min()} to {used.max()}, categories from {min(known)} to "
                f"{max(known)}: each one {word}?"
            )
            report.report_places("shifted_category", [(report.source.place.name, detail)])
            return


@dataclass(frozen=True, eq=False)
class Columns:
    """What annotations say, each by itself.

    Shape: numbers [A], 0 where they are not whole numbers (`has_`); area [A] and xywh [A,4], NaN
    where they are none; crowd, and where that is not said [A]; the boxes that were `computed` from
    masks, and those that were rotated after they were drawn [A].
    """

    id: IntArray
    has_id: BoolArray
    image_id: IntArray
    has_image_id: BoolArray
    category_id: IntArray
    has_category_id: BoolArray
    area: FloatArray
    crowd: BoolArray
    no_crowd: BoolArray
    xywh: FloatArray
    computed: BoolArray
    rotated: BoolArray

    @classmethod
    def of(cls, entries: Sequence[Mapping[str, Any]]) -> "Columns":
        """Read entries."""
        ids, images, categories = (
            _whole_numbers([entry.get(key) for entry in entries])
            for key in ("id", "image_id", "category_id")
        )
        crowd, no_crowd = _crowds([entry.get("iscrowd") for entry in entries])
        xywh = _boxes([entry.get("bbox") for entry in entries])
        return cls(
            *ids,
            *images,
            *categories,
            area=_areas([entry.get("area") for entry in entries]),
            crowd=crowd,
            no_crowd=no_crowd,
            xywh=xywh,
            computed=_compute_boxes(xywh, entries),
            rotated=_rotated(entries),
        )

    @classmethod
    def concatenate(cls, parts: "list[Columns]") -> "Columns":
        """Return those of all parts, which are emptied: of large files there are gigabytes."""
        lists = [[getattr(part, f.name) for f in fields(cls)] for part in parts or [cls.of([])]]
        parts.clear()
        columns = []
        for i in range(len(fields(cls))):
            columns.append(np.concatenate([column[i] for column in lists]))
            for column in lists:
                column[i] = None
        return cls(*columns)

    @property
    def clean(self) -> bool:
        """Whether nothing is missing or of another type."""
        there = (self.has_id, self.has_image_id, self.has_category_id, ~self.no_crowd)
        numbers = (self.area, self.xywh)
        return all(c.all() for c in there) and not any(np.isnan(c).any() for c in numbers)


def read_piece(entries: list[Any], *, reading: Reading) -> Columns:
    """Return what some annotations of a file say, if `interpret` would leave them as they are.

    Raises:
        Unsuitable: it would not, so that the file must be read as a whole.
    """
    if set(map(type, entries)) != {dict}:
        raise Unsuitable
    columns = Columns.of(entries)
    if any([entry["ignore"] is not None for entry in entries if "ignore" in entry]):
        raise Unsuitable
    if reading.crowd == "as_objects" and columns.crowd.any():
        raise Unsuitable
    if not columns.clean:
        found = [[entry.get(key) for entry in entries] for key in _MAY_BE_TEXT]
        boxes = [box for box in found[-1] if isinstance(box, list)]
        if any(str in set(map(type, values)) for values in (*found, chain.from_iterable(boxes))):
            raise Unsuitable
    return columns


def _compute_boxes(xywh: FloatArray, entries: Sequence[Mapping[str, Any]]) -> BoolArray:
    """Replace boxes that are none by those around their masks; return which could be [A]."""
    computed = np.zeros(len(entries), dtype=np.bool_)
    for i in np.flatnonzero(~(xywh[:, 2:] > 0).all(axis=1)).tolist():
        box = box_around(entries[i].get("segmentation"))
        if box is not None:
            xywh[i], computed[i] = box, True
    return computed


def _rotated(entries: Sequence[Mapping[str, Any]]) -> BoolArray:
    """Return which boxes [A] were rotated after they were drawn, as CVAT writes it."""
    if not any([entry["attributes"] for entry in entries if "attributes" in entry]):
        return np.zeros(len(entries), dtype=np.bool_)
    return np.array([_rotation(entry) != "" for entry in entries], dtype=np.bool_)


def _rotation(entry: Mapping[str, Any]) -> str:
    attributes = entry.get("attributes")
    angle: Any = attributes.get("rotation") if isinstance(attributes, Mapping) else None
    return f"by {angle:g} degrees" if is_number(angle) and angle % 180 else ""


def _lacking(entry: Mapping[str, Any]) -> str:
    area = [] if is_area(entry.get("area")) else ["area"]
    return ", ".join([*area, *([] if entry.get("iscrowd") in (0, 1) else ["iscrowd"])])


def _number(report: SplitReport, columns: Columns, rows: IntArray) -> IntArray:
    """Return the ids of annotations [A]; those without a unique id get unused ones."""
    ids, whole = columns.id, columns.has_id
    if whole.all() and (np.diff(ids) > 0).all():
        return ids
    known, first = np.unique(ids[whole], return_index=True)
    own = np.zeros(len(ids), dtype=np.bool_)
    own[np.flatnonzero(whole)[first]] = True
    for kind, chosen in (("no_annotation_id", ~whole), ("repeated_annotation", whole & ~own)):
        _report_entries(report, kind, "annotations", rows[chosen], "id")
    ids = ids.copy()
    ids[~own] = np.setdiff1d(np.arange(1, len(ids) + 1), known)[: (~own).sum()]
    return ids


def _look_up(table: IntArray, values: IntArray, valid: BoolArray) -> IntArray:
    """Return where each value [A] is in a table of distinct numbers, -1 if nowhere."""
    if not len(table):
        return np.full(len(values), -1)
    order = np.argsort(table)
    place = order[np.searchsorted(table[order], values).clip(max=len(table) - 1)]
    return np.where(valid & (table[place] == values), place, -1)


def _whole_numbers(values: Sequence[object]) -> tuple[IntArray, BoolArray]:
    """Return JSON values as numbers [A], 0 for others, and which are whole numbers [A]."""
    if set(map(type, values)) == {int}:
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.int64), np.ones(len(values), dtype=np.bool_)
    valid = [is_whole(value) for value in values]
    numbers = [value if ok else 0 for value, ok in zip(values, valid, strict=True)]
    return np.array(numbers, dtype=np.int64), np.array(valid, dtype=np.bool_)


def _areas(values: Sequence[object]) -> FloatArray:
    """Return JSON values as areas [A], NaN for what cannot be one."""
    if set(map(type, values)) <= {int, float}:
        with contextlib.suppress(OverflowError):
            area = np.array(values, dtype=np.float64)
            area[~((area >= 0) & (area < LIMIT))] = np.nan
            return area
    return np.array([value if is_area(value) else np.nan for value in values], dtype=np.float64)


def _crowds(values: Sequence[object]) -> tuple[BoolArray, BoolArray]:
    """Return which JSON values say that a box is of a crowd [A], and which say nothing [A]."""
    if set(map(type, values)) == {int}:
        with contextlib.suppress(OverflowError):
            numbers = np.array(values, dtype=np.int64)
            return numbers == 1, (numbers != 0) & (numbers != 1)
    crowd = [value == 1 for value in values]
    unsaid = [value not in (0, 1) for value in values]
    return np.array(crowd, dtype=np.bool_), np.array(unsaid, dtype=np.bool_)


def _boxes(values: Sequence[object]) -> FloatArray:
    """Return JSON values as boxes [A,4], NaN for what is not a list of four finite numbers."""
    boxes = [box if isinstance(box, list) and len(box) == 4 else _NO_BOX for box in values]
    if set(map(type, chain.from_iterable(boxes))) <= {int, float}:
        with contextlib.suppress(OverflowError):
            xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
            xywh[~(np.abs(xywh) < LIMIT).all(axis=1)] = np.nan
            return xywh
    sound = [box if all(map(is_number, box)) else _NO_BOX for box in boxes]
    return np.array(sound, dtype=np.float64).reshape(-1, 4)
