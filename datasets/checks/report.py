"""What was found, as one page that needs nothing else."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from datasets.checks.diagnosis import Diagnosis
from datasets.checks.kinds import GROUPS, KINDS
from datasets.checks.split_report import SplitReport
from datasets.checks.summary import verdict
from datasets.checks.thumbnails import Thumbnails
from util.html import render, svg
from util.plot import column_chart

_SIDES = (0, 4, 8, 16, 32, 64, 128, 256, 512)
_SHORT = (0, 240, 320, 480, 640, 800, 1080, 1600, 2400)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_CODE = re.compile(r"`[^`]*`|--\w+")


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
        for group in GROUPS
        for name, found in diagnosis.findings.items()
        if KINDS[name].group == group
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
        splits=[
            {
                "name": report.split,
                "images": len(report.section("images")),
                "annotations": len(report.section("annotations")),
                "boxes": sum(report.boxes_by_class().values()),
                "classes": len(report.classes),
                "place": report.source.place,
            }
            for report in diagnosis.splits
        ],
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
