"""What was found: lines for the terminal, and one page that needs nothing else."""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from datasets.checks.diagnosis import Diagnosis
from datasets.checks.findings import NAMED, Finding, first_few
from datasets.checks.kinds import KINDS
from datasets.checks.split_report import SplitReport
from datasets.checks.thumbnails import Thumbnails
from util.html import render, svg
from util.plot import column_chart

_CLASSES = 8  # shown in the terminal
_SIDES = (0, 4, 8, 16, 32, 64, 128, 256, 512)
_SHORT = (0, 240, 320, 480, 640, 800, 1080, 1600, 2400)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_CODE = re.compile(r"`[^`]*`|--\w+")


def summary(diagnosis: Diagnosis) -> str:
    """Return a line on each split, then each kind of flaw: how many, what, what follows."""
    lines = [_of_split(report) for report in diagnosis.splits]
    by_group = groupby(diagnosis.findings.items(), key=lambda item: KINDS[item[0]].group)
    for group, found in by_group:
        lines += ["", group, *(line for kind in found for line in _of_kind(*kind))]
    return "\n".join([*lines, "", verdict(diagnosis)])


def verdict(diagnosis: Diagnosis) -> str:
    """Return whether the data is sound, in a sentence."""
    wrong = {k: len(v) for k, v in diagnosis.findings.items() if not KINDS[k].note}
    notes = len(diagnosis.findings) - len(wrong)
    also = f" Worth knowing: {notes} kind{'s' if notes > 1 else ''}." if notes else ""
    if not wrong:
        return f"Nothing is wrong.{also}"
    kinds = f"{len(wrong)} kind{'s' if len(wrong) > 1 else ''}"
    return f"Wrong: {sum(wrong.values())} in {kinds}.{also}"


def _of_split(report: SplitReport) -> str:
    by_class, names = report.boxes_by_class(), report.unique_class_names()
    shown = [f"{names[i]} {count}" for i, count in by_class.items()]
    more = f", and {len(shown) - _CLASSES} more classes" if len(shown) > _CLASSES else ""
    return (
        f"{report.split}: {len(report.section('images'))} images, "
        f"{len(report.section('annotations'))} annotations ({sum(by_class.values())} usable boxes)"
        f", {len(shown)} classes: {', '.join(shown[:_CLASSES])}{more}"
    )


def _of_kind(name: str, found: list[Finding]) -> list[str]:
    kind = KINDS[name]
    examples = first_few([f"{one.split} {one}" for one in found[:NAMED]], len(found))
    fix = f" --fix: {kind.fix}." if kind.fix else ""
    return [
        f"  {len(found):>6}  {kind.title} ({'note, ' if kind.note else ''}{name}): {kind.meaning}",
        f"          training {kind.training}.{fix}",
        f"          {examples}",
    ]


def page(diagnosis: Diagnosis, *, title: str) -> str:
    """Return the page: HTML with its styles, charts and thumbnails inside."""
    thumbnails = Thumbnails(diagnosis.splits)
    kinds = [
        {
            "name": name,
            "about": KINDS[name],
            "found": found,
            "thumbnails": list(thumbnails.of_kind(name, found)),
        }
        for name, found in diagnosis.findings.items()
    ]
    counts = []  # by name, as ids of splits may differ
    for report in diagnosis.splits:
        names = report.unique_class_names()
        counts.append({names[i]: count for i, count in report.boxes_by_class().items()})
    html = render(
        Path(__file__).with_name("report.html.j2"),
        prose=_prose,
        title=f"Check: {title}",
        verdict=verdict(diagnosis),
        kinds=kinds,
        splits=diagnosis.splits,
        class_header=[
            "class",
            *(cell for report in diagnosis.splits for cell in (report.split, "")),
        ],
        class_rows=[
            (name, [by_name.get(name, 0) for by_name in counts])
            for name in dict.fromkeys(name for by_name in counts for name in by_name)
        ],
        most_boxes=max((n for by_name in counts for n in by_name.values()), default=0),
        charts=[
            _histogram(diagnosis, "Box sizes", "side of a square as large, pixels", _SIDES, _sides),
            _histogram(diagnosis, "Boxes in an image", "usable boxes", _COUNTS, _counts),
            _histogram(diagnosis, "Image sizes", "short side, pixels", _SHORT, _short_sides),
        ],
    )
    return html.encode("utf-8", "backslashreplace").decode()  # lone surrogates, which JSON can hold


def _histogram(
    diagnosis: Diagnosis,
    title: str,
    xlabel: str,
    edges: Sequence[int],
    values_of: Callable[[SplitReport], NDArray[Any]],
) -> tuple[str, Markup]:
    """Return a title, and a chart of how many values are from each edge up to the next."""
    series = {}
    for report in diagnosis.splits:
        bins = np.digitize(values_of(report), edges[1:])
        series[report.split] = np.bincount(bins.astype(np.int64), minlength=len(edges)).tolist()
    labels = [f"{edge}+" if edge == edges[-1] else str(edge) for edge in edges]
    text = "; ".join(
        f"{split}: " + ", ".join(f"{label} {n}" for label, n in zip(labels, counts, strict=True))
        for split, counts in series.items()
    )
    chart = column_chart(labels, series, xlabel=f"{xlabel}, from the number up to the next")
    return title, svg(chart, f"{title}. {text}")


def _sides(report: SplitReport) -> NDArray[Any]:
    areas = report.xywh[report.usable, 2:].prod(axis=1)
    return np.asarray(np.sqrt(areas.clip(0)))


def _counts(report: SplitReport) -> NDArray[Any]:
    return report.boxes_per_image()


def _short_sides(report: SplitReport) -> NDArray[Any]:
    sides = report.images.sizes.min(axis=1)
    return np.asarray(sides[sides > 0])


def _prose(text: str, *, capital: bool = False) -> Markup:
    """Return text for a page: options and what is in backticks as code, maybe a capital first."""
    html = str(escape(text[0].upper() + text[1:] if capital else text))
    return Markup(_CODE.sub(lambda found: f"<code>{found[0].strip('`')}</code>", html))
