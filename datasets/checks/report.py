"""What was found, as one page that needs nothing else."""

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.checks.diagnosis import Diagnosis
from datasets.checks.findings import Finding
from datasets.checks.kinds import GROUPS, KINDS
from datasets.checks.split_report import SplitReport
from datasets.checks.summary import verdict
from datasets.checks.thumbnails import Thumbnails
from util.html import STYLE, bar, column_chart, table

_LISTED = 200  # findings of a kind; all are in check.json
_CLASSES = 20  # in sight; the others unfold
_UNFOLDED = 8  # findings that are listed in sight if there are no images
_SIDES = (0, 4, 8, 16, 32, 64, 128, 256, 512)
_SHORT = (0, 240, 320, 480, 640, 800, 1080, 1600, 2400)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_CODE = re.compile(r"`[^`]*`|--\w+")
_OWN = """
.told thead th, .told td { text-align: left; } .told td:nth-of-type(1) { text-align: right; }
.told thead th:nth-child(2) { text-align: right; }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.left th, .left td, .splits th:last-child { text-align: left; }
tbody th { white-space: normal; min-width: 7.5rem; max-width: 22rem; overflow-wrap: anywhere; }
code { white-space: nowrap; }
@media (max-width: 40rem) { .told td.text { min-width: 9rem; } th, td { padding: .28rem .35rem; } }
.verdict { color: var(--ink); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; } .charts figure { margin: 0; } figcaption { overflow-wrap: anywhere; }
"""


def page(diagnosis: Diagnosis, *, title: str) -> str:
    """Return the page: HTML with its styles, charts and thumbnails inside."""
    sections = [_overview(diagnosis), _numbers(diagnosis)]
    thumbnails = Thumbnails(diagnosis.splits)
    for group in GROUPS:
        kinds = [kind for kind in diagnosis.findings if KINDS[kind].group == group]
        if kinds:
            told = [_of_kind(kind, diagnosis.findings[kind], thumbnails) for kind in kinds]
            sections.append(f"<h2>{group}</h2>" + "".join(told))
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Check: {escape(title)}</title><style>{STYLE}{_OWN}</style></head><body><main>"
        f"<h1>Check: {escape(title)}</h1>"
        f'<p class="verdict">{verdict(diagnosis)}</p>' + "\n".join(sections) + "</main></body>"
        "</html>\n"
    )
    return html.encode("utf-8", "backslashreplace").decode()  # lone surrogates, which JSON can hold


def _overview(diagnosis: Diagnosis) -> str:
    rows = [
        [f'<a href="#{kind}">{_prose(KINDS[kind].title, 0)}</a>', str(len(found)),
         "note" if KINDS[kind].note else "wrong",
         f'<td class="text">{_prose(KINDS[kind].training, 0)}</td>',
         f'<td class="text">{_prose(KINDS[kind].fix or "–", 0)}</td>']
        for kind, found in diagnosis.findings.items()
    ]  # fmt: skip
    if not rows:
        return ""
    header = ["kind", "count", "", "training", "--fix"]
    return "<h2>What was found</h2>" + table(
        "Each kind, what training does about it and what a corrected copy does",
        header, rows, kind="told",
    )  # fmt: skip


def _numbers(diagnosis: Diagnosis) -> str:
    rows = [
        [escape(report.split), str(len(report.section("images"))),
         str(len(report.section("annotations"))), str(sum(report.boxes_by_class().values())),
         str(len(report.classes)), f'<td class="text">{escape(str(report.source.place))}</td>']
        for report in diagnosis.splits
    ]  # fmt: skip
    header = ["split", "images", "annotations", "usable boxes", "classes", "from"]
    charts = [
        _histogram(diagnosis, _SIDES, _sides, "Box sizes", "side of a square as large, pixels"),
        _histogram(diagnosis, _COUNTS, _counts, "Boxes in an image", "usable boxes"),
        _histogram(diagnosis, _SHORT, _short_sides, "Image sizes", "short side, pixels"),
    ]
    return (
        "<h2>The data</h2>" + table("Splits", header, rows, "splits")
        + _classes(diagnosis) + f'<div class="charts">{"".join(charts)}</div>'
    )  # fmt: skip


def _classes(diagnosis: Diagnosis) -> str:
    counts = []  # by name, as ids of splits may differ
    for report in diagnosis.splits:
        names = report.unique_class_names()
        counts.append({names[i]: count for i, count in report.boxes_by_class().items()})
    most = max((n for found in counts for n in found.values()), default=0)
    rows = []
    for name in dict.fromkeys(name for found in counts for name in found):
        cells = [escape(name)]
        for found in counts:
            cells += [str(found.get(name, 0)), bar(found.get(name, 0), most)]
        rows.append(cells)
    header = ["class", *(cell for report in diagnosis.splits for cell in (report.split, ""))]
    shown = "<h3>Classes</h3>" + table("Usable boxes of each class", header, rows[:_CLASSES])
    if len(rows) <= _CLASSES:
        return shown
    rest = table("Usable boxes of the other classes", header, rows[_CLASSES:])
    return f"{shown}<details><summary>{len(rows) - _CLASSES} classes more</summary>{rest}</details>"


def _histogram(
    diagnosis: Diagnosis,
    edges: Sequence[int],
    values_of: Callable[[SplitReport], NDArray[Any]],
    title: str,
    across: str,
) -> str:
    """Return a chart of how many values are from each edge up to the next."""
    series = {}
    for report in diagnosis.splits:
        bins = np.digitize(values_of(report), edges[1:])
        series[report.split] = np.bincount(bins.astype(np.int64), minlength=len(edges)).tolist()
    labels = [f"{edge}+" if edge == edges[-1] else str(edge) for edge in edges]
    across += ", from the number up to the next"
    told = "; ".join(
        f"{split}: " + ", ".join(f"{label} {n}" for label, n in zip(labels, counts, strict=True))
        for split, counts in series.items()
    )
    chart = column_chart(labels, series, f"{title}. {told}", across=across)
    return f"<figure><h3>{title}</h3>{chart}</figure>"


def _sides(report: SplitReport) -> NDArray[Any]:
    areas = report.xywh[report.usable, 2:].prod(axis=1)
    return np.asarray(np.sqrt(areas.clip(0)))


def _counts(report: SplitReport) -> NDArray[Any]:
    return report.boxes_per_image()


def _short_sides(report: SplitReport) -> NDArray[Any]:
    sides = report.images.sizes.min(axis=1)
    return np.asarray(sides[sides > 0])


def _of_kind(kind: str, found: Sequence[Finding], thumbnails: Thumbnails) -> str:
    told = KINDS[kind]
    fix = f" A corrected copy: {told.fix}." if told.fix else ""
    figures = "".join(thumbnails.figures(kind, found))
    rows = [
        [escape(o.split), f'<td class="text">{escape(o.place)}</td>',
         "" if o.image_id is None else str(o.image_id),
         "" if o.annotation_id is None else str(o.annotation_id),
         f'<td class="text">{escape(o.detail)}</td>']
        for o in found[:_LISTED]
    ]  # fmt: skip
    unfolded = "" if figures or len(found) > _UNFOLDED else " open"
    first = f"The first {_LISTED} of " if len(found) > _LISTED else ""
    listed = table(told.title, ["split", "where", "image", "annotation", "what"], rows, "left")
    return (
        f'<section id="{kind}"><h3>{_prose(told.title)}: {len(found)}</h3>'
        f"<p>{_prose(told.meaning)}. Training {_prose(told.training, 0)}.{escape(fix)}</p>"
        f'<div class="grid">{figures}</div>'
        f"<details{unfolded}><summary>{first}{len(found)} listed</summary>{listed}</details>"
        "</section>"
    )


def _prose(text: str, capitals: int = 1) -> str:
    """Return text for a page: options and what is in backticks as code, a capital to begin with."""
    told = escape(text[:capitals].upper() + text[capitals:])
    return _CODE.sub(lambda found: f"<code>{found[0].strip('`')}</code>", told)
