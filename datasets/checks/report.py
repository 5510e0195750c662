"""What was found, as one page that needs nothing else."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape

from datasets.checks.diagnosis import Diagnosis, boxes_by_class, names_by_class
from datasets.checks.kinds import GROUPS, KINDS
from datasets.checks.ledger import Ledger
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
    thumbnails = Thumbnails(diagnosis.ledgers)
    kinds = [
        {
            "name": name,
            "about": KINDS[name],
            "found": found,
            "thumbnails": list(thumbnails.of_kind(name, found)),
        }
        for group in GROUPS
        for name, found in diagnosis.offenders.items()
        if KINDS[name].group == group
    ]
    counts = []  # by name, as ids of splits may differ
    for ledger in diagnosis.ledgers:
        names = names_by_class(ledger)
        counts.append({names[i]: count for i, count in boxes_by_class(ledger).items()})
    html = render(
        Path(__file__).with_name("report.html.j2"),
        prose=_prose,
        title=f"Check: {title}",
        verdict=verdict(diagnosis),
        kinds=kinds,
        splits=[
            {
                "name": ledger.split,
                "images": len(ledger.section("images")),
                "annotations": len(ledger.section("annotations")),
                "boxes": sum(boxes_by_class(ledger).values()),
                "classes": len(ledger.class_names),
                "place": ledger.source.place,
            }
            for ledger in diagnosis.ledgers
        ],
        class_header=[
            "class",
            *(cell for ledger in diagnosis.ledgers for cell in (ledger.split, "")),
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
    values_of: Callable[[Ledger], list[float]],
) -> tuple[str, Markup]:
    """Return a title, and a chart of how many values are from each edge up to the next."""
    series = {}
    for ledger in diagnosis.ledgers:
        bins = np.digitize(values_of(ledger), edges[1:])
        series[ledger.split] = np.bincount(bins.astype(np.int64), minlength=len(edges)).tolist()
    labels = [f"{edge}+" if edge == edges[-1] else str(edge) for edge in edges]
    text = "; ".join(
        f"{split}: " + ", ".join(f"{label} {n}" for label, n in zip(labels, counts, strict=True))
        for split, counts in series.items()
    )
    chart = column_chart(labels, series, xlabel=f"{xlabel}, from the number up to the next")
    return title, svg(chart, f"{title}. {text}")


def _sides(ledger: Ledger) -> list[float]:
    return [
        float(max(0.0, box.xywh[2] * box.xywh[3]) ** 0.5)
        for image in ledger.images
        for box in image.usable_boxes
    ]


def _counts(ledger: Ledger) -> list[float]:
    return [float(len(image.usable_boxes)) for image in ledger.images]


def _short_sides(ledger: Ledger) -> list[float]:
    return [float(min(image.size)) for image in ledger.images if image.size]


def _prose(text: str, *, capital: bool = False) -> Markup:
    """Return text for a page: options and what is in backticks as code, maybe a capital first."""
    html = str(escape(text[0].upper() + text[1:] if capital else text))
    return Markup(_CODE.sub(lambda found: f"<code>{found[0].strip('`')}</code>", html))
