"""What was found: lines for the terminal, and one page that needs nothing else."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup, escape
from PIL import Image, ImageOps

from datasets.arrays import FloatArray, IntArray
from datasets.checks.diagnosis import Diagnosis
from datasets.checks.findings import NAMED, Finding, SplitReport, first_few
from datasets.checks.kinds import BOXES, KINDS
from datasets.images import READ_ERRORS, read_rgb
from util.console import short_name
from util.draw import draw_boxes
from util.html import inline_image, render, svg
from util.plot import column_chart

_CLASSES = 8  # shown in the terminal
_SIDES = (0, 4, 8, 16, 32, 64, 128, 256, 512)
_SHORT = (0, 240, 320, 480, 640, 800, 1080, 1600, 2400)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_SHOWN = 6  # thumbnails of a kind
_SIDE = 300  # pixels, the longer one of a thumbnail
_MARGIN = 0.4  # of the side, at most: grey around the image, where boxes extend past it
_BEYOND = 8  # pixels of it past the furthest box
_GREY = (128, 128, 128)
_CLOSE_UP, _NEAR = ("small_bbox", "vanishing_bbox"), 0.2  # of the image's longer side
_CODE = re.compile(r"`[^`]*`")


def summary(diagnosis: Diagnosis) -> str:
    """Return a line on each split, then each kind of flaw: how many, what, what follows."""
    lines = [_of_split(report) for report in diagnosis.splits]
    for group, found in groupby(diagnosis.findings.items(), lambda item: KINDS[item[0]].group):
        lines += ["", group, *(line for kind in found for line in _of_kind(*kind))]
    return "\n".join([*lines, "", verdict(diagnosis)])


def verdict(diagnosis: Diagnosis) -> str:
    """Return whether the data is sound, in a sentence."""
    wrong = {k: len(v) for k, v in diagnosis.findings.items() if not KINDS[k].note}
    notes = len(diagnosis.findings) - len(wrong)
    also = f" Worth knowing: {notes} kind{'s' if notes > 1 else ''}." if notes else ""
    if not wrong:
        return f"Nothing is wrong.{also}"
    several = "s" if len(wrong) > 1 else ""
    return f"Wrong: {sum(wrong.values())} in {len(wrong)} kind{several}.{also}"


def _of_split(report: SplitReport) -> str:
    by_name = report.boxes_by_name()
    shown = [f"{name} {count}" for name, count in by_name.items()]
    more = f", and {len(shown) - _CLASSES} more classes" if len(shown) > _CLASSES else ""
    return (
        f"{report.split}: {len(report.section('images'))} images, "
        f"{len(report.section('annotations'))} annotations ({report.num_trained} usable boxes)"
        f", {len(shown)} classes: {', '.join(shown[:_CLASSES])}{more}"
    )


def _of_kind(name: str, found: list[Finding]) -> list[str]:
    kind = KINDS[name]
    examples = first_few([f"{one.split} {one}" for one in found[:NAMED]], len(found))
    fix = f" A corrected copy: {kind.fix}." if kind.fix else ""
    return [
        f"  {len(found):>6}  {kind.title} ({'note, ' if kind.note else ''}{name}): {kind.meaning}",
        f"          training {kind.training}.{fix}",
        f"          {examples}",
    ]


def page(diagnosis: Diagnosis, *, title: str) -> str:
    """Return the page: HTML with its styles, charts and thumbnails inside."""
    splits = diagnosis.splits
    images: dict[tuple[str, int | None], tuple[SplitReport, int]] = {
        (report.split, int(report.images.ids[i])): (report, i)
        for report in splits
        for i in np.flatnonzero(report.sound).tolist()
    }
    counts = [report.boxes_by_name() for report in splits]  # ids of splits may differ
    html = render(
        Path(__file__).with_name("report.html.j2"),
        prose=_prose,
        title=f"Check: {title}",
        verdict=verdict(diagnosis),
        kinds=[
            {
                "name": name,
                "about": KINDS[name],
                "found": found,
                "thumbnails": list(_thumbnails(name, found, images)),
            }
            for name, found in diagnosis.findings.items()
        ],
        splits=splits,
        class_header=["class", *(cell for report in splits for cell in (report.split, ""))],
        class_rows=[
            (name, [by_name.get(name, 0) for by_name in counts])
            for name in dict.fromkeys(name for by_name in counts for name in by_name)
        ],
        most_boxes=max((n for by_name in counts for n in by_name.values()), default=0),
        charts=[
            _histogram(
                "Box sizes",
                "side of a square as large, pixels",
                _SIDES,
                {r.split: np.sqrt(r.xywh[r.usable, 2:].prod(axis=1).clip(0)) for r in splits},
            ),
            _histogram(
                "Boxes in an image",
                "usable boxes",
                _COUNTS,
                {r.split: r.boxes_per_image() for r in splits},
            ),
            _histogram(
                "Image sizes",
                "short side, pixels",
                _SHORT,
                {r.split: r.images.sizes[r.images.sizes.all(axis=1)].min(axis=1) for r in splits},
            ),
        ],
    )
    return html.encode("utf-8", "backslashreplace").decode()  # lone surrogates, which JSON can hold


def _histogram(
    title: str, xlabel: str, edges: Sequence[int], values: Mapping[str, IntArray | FloatArray]
) -> tuple[str, Markup]:
    """Return a title, and a chart of how many values of splits are from each edge to the next."""
    series = {
        split: np.bincount(np.digitize(found, edges[1:]), minlength=len(edges)).tolist()
        for split, found in values.items()
    }
    labels = [f"{edge}+" if edge == edges[-1] else str(edge) for edge in edges]
    text = "; ".join(
        f"{split}: " + ", ".join(f"{label} {n}" for label, n in zip(labels, counts, strict=True))
        for split, counts in series.items()
    )
    chart = column_chart(labels, series, xlabel=f"{xlabel}, from the number up to the next")
    return title, svg(chart, f"{title}. {text}")


def _thumbnails(
    kind: str,
    found: Sequence[Finding],
    images: Mapping[tuple[str, int | None], tuple[SplitReport, int]],
) -> Iterator[dict[str, Any]]:
    """Yield the first of the sound `images` that have a flaw: what each shows, and its caption."""
    shown: set[tuple[str, int | None]] = set()
    for finding in found[:2000]:
        key = (finding.split, finding.image_id)
        if key in shown or key not in images or len(shown) == _SHOWN:
            continue
        report, image = images[key]
        height, width = report.images.sizes[image].tolist()
        try:
            pixels = read_rgb(report.path(image), (height, width))
        except READ_ERRORS:  # changed since it was decoded
            continue
        shown.add(key)
        about_box = KINDS[kind].group == BOXES and finding.annotation_id is not None
        rows = report.rows_by_image[image]
        if about_box:
            rows = rows[report.annotations.ids[rows] == finding.annotation_id]
        if about_box and kind in _CLOSE_UP:
            drawn = _close_up(pixels, report.xywh[rows[0]])
        else:
            drawn = _with_boxes(pixels, report, rows.tolist(), given=about_box)
        if finding.partner:
            with suppress(*READ_ERRORS):
                other = images[finding.partner.split, finding.partner.image_id]
                drawn = _beside(drawn, _of_image(*other))
        detail = f": {finding.detail}" if finding.detail else ""
        caption = f"{finding.split} {finding.place}{detail}"
        yield {
            "image": inline_image(drawn, max_width=2 * _SIDE + _BEYOND),
            "alt": f"{KINDS[kind].title}: {caption}; {len(rows)} boxes drawn",
            "caption": caption,
            "wide": finding.partner is not None,
        }


def _of_image(report: SplitReport, image: int) -> Image.Image:
    """Return a small version of an image with the boxes of training.

    Raises:
        READ_ERRORS: it has changed since it was decoded.
    """
    height, width = report.images.sizes[image].tolist()
    pixels = read_rgb(report.path(image), (height, width))
    return _with_boxes(pixels, report, report.rows_by_image[image].tolist(), given=False)


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two images as one, with grey between and around them."""
    size = (left.width + _BEYOND + right.width, max(left.height, right.height))
    both = Image.new("RGB", size, _GREY)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _BEYOND, 0))
    return both


def _close_up(pixels: Image.Image, xywh: FloatArray) -> Image.Image:
    """Return the part of an image around a small box, which has no tag."""
    x, y, w, h = xywh.tolist()
    side = round(max(_NEAR * max(pixels.size), 2 * max(w, h)))
    left, top = (
        round(min(max(0, start + size / 2 - side / 2), max(0, whole - side)))
        for start, size, whole in ((x, w, pixels.width), (y, h, pixels.height))
    )
    part = pixels.crop((left, top, min(pixels.width, left + side), min(pixels.height, top + side)))
    return _draw(part, [(xywh - (left, top, 0, 0), "", 0)], margin=_MARGIN)


def _with_boxes(
    pixels: Image.Image, report: SplitReport, rows: list[int], *, given: bool
) -> Image.Image:
    """Return a small image with boxes as `given` and as fixed, or with those of training."""
    boxes: list[tuple[FloatArray, str, int]] = []
    for row in rows:
        if given and report.fixed[row]:
            boxes += [(report.annotations.xywh[row], "as given", 0), (report.xywh[row], "fixed", 1)]
        else:
            label = report.annotations.labels[row]
            name = short_name(report.classes.names[label])
            boxes.append((report.xywh[row], name, abs(report.classes.ids[label])))
    return _draw(pixels, boxes, margin=_MARGIN if given else 0)


def _draw(
    pixels: Image.Image, boxes: list[tuple[FloatArray, str, int]], *, margin: float
) -> Image.Image:
    """Return a small image with boxes (xywh, name, colour), and grey around it if they need it.

    `margin` is how wide that may be, as a share of the longer side.
    """
    scale = _SIDE / max(pixels.size)
    width, height = (max(1, round(side * scale)) for side in pixels.size)
    xywh = np.array([box for box, _, _ in boxes]).reshape(-1, 4) * scale
    ends = np.stack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
    corners = np.concatenate([ends.min(axis=0), ends.max(axis=0)], axis=1)
    past = np.concatenate([-corners[:, :2], corners[:, 2:] - (width, height)]).max(initial=0)
    border = round(min(past + _BEYOND, margin * _SIDE)) if past > 0 else 0
    return draw_boxes(
        ImageOps.expand(pixels.resize((width, height)), border, _GREY),
        torch.from_numpy(corners + border),
        labels=[colour for _, _, colour in boxes],
        names=[name for _, name, _ in boxes],
    )


def _prose(text: str, *, capital: bool = False) -> Markup:
    """Return text for a page: what is in backticks as code, maybe a capital first."""
    html = str(escape(text[0].upper() + text[1:] if capital else text))
    return Markup(_CODE.sub(lambda found: f"<code>{found[0].strip('`')}</code>", html))
