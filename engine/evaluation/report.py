"""An analysis as one page that needs nothing else."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from engine.evaluation.analysis import Analysis
from engine.evaluation.errors import KINDS, by_cost
from util.files import write_atomic
from util.html import STYLE, bar, curve_chart, heat, shown, table
from util.html import image as embedded

_MOST_IN_MATRIX = 30


def save_report(
    output_dir: Path, analysis: Analysis, images: Mapping[int, Image.Image], *, title: str
) -> None:
    """Write `eval/report.html`; `images`, by image id, are shown with the worst."""
    page = report(analysis, images, title=title)
    write_atomic(output_dir / "eval" / "report.html", page, errors="backslashreplace")


def report(analysis: Analysis, images: Mapping[int, Image.Image], *, title: str) -> str:
    """Return the page: HTML with its styles, charts and images inside."""
    result = analysis.result
    boxes = sum(c.boxes for c in analysis.classes)
    sections = [
        _numbers(analysis),
        _errors(analysis),
        _curves(analysis),
        _classes(analysis),
        _confusion(analysis),
        _by_objects(analysis),
        _worst(analysis, images),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation: {escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Evaluation: {escape(title)}</h1><p>{result.num_images} images, {boxes} objects of "
        f"{len(analysis.classes)} classes, {result.num_detections} detections.</p>"
        + "\n".join(sections)
        + "</main></body></html>\n"
    )


def _numbers(analysis: Analysis) -> str:
    stats = analysis.result.stats

    def row(title: str, *names: str) -> list[str]:
        values = [shown(stats[n] if n and stats[n] >= 0 else None) if n else "" for n in names]
        return [title, *values, *[""] * (4 - len(values))]

    rows = [
        row("AP (IoU 0.50 to 0.95)", "AP", "AP_small", "AP_medium", "AP_large"),
        row("AP at IoU 0.50", "AP50"),
        row("AP at IoU 0.75", "AP75"),
        row("AR, 1 detection", "AR_1"),
        row("AR, 10 detections", "AR_10"),
        row("AR, 100 detections", "AR_100", "AR_small", "AR_medium", "AR_large"),
    ]
    lacking = " n/a: no such objects in the data." if min(stats.values()) < 0 else ""
    note = f"<p>Small is under 32², large over 96² square pixels.{lacking}</p>"
    beyond = analysis.result.beyond_100
    if beyond:
        values = ", ".join(
            f"{k} {shown(v if v >= 0 else None)}" for k, v in beyond.items() if k[0] == "A"
        )
        note += (
            "<p>COCO counts 100 detections of an image and class; "
            f"with {beyond['max_dets']:.0f}: {values}.</p>"
        )
    header = ["", "all", "small", "medium", "large"]
    return "<h2>COCO's numbers</h2>" + table("Average precision and recall", header, rows) + note


def _errors(analysis: Analysis) -> str:
    most = max((e.delta_AP50 or 0.0 for e in analysis.errors.values()), default=0.0)
    rows = [
        [kind, shown(e.delta_AP50), bar(e.delta_AP50, most), str(e.above_threshold), str(e.count),
         f'<td class="text">{KINDS[kind]}</td>']
        for kind, e in by_cost(analysis.errors)
    ]  # fmt: skip
    header = ["error", "AP50 lost", "", "above threshold", "in all", "meaning"]
    return (
        "<h2>What goes wrong</h2><p>By how much AP50 would rise if only errors of this kind were "
        "mended, as TIDE defines them: right from an IoU of 0.5, background below 0.1. A detection "
        "above its class's best threshold is one that a user would see.</p>"
        + table("Kinds of errors and their cost", header, rows, kind="told")
    )


def _curves(analysis: Analysis) -> str:
    if not analysis.curves:
        return "<h2>Precision and recall</h2><p>No objects to find: n/a.</p>"
    lines = {f"IoU {iou}": values for iou, values in analysis.curves.items()}
    means = ", ".join(f"{np.mean(v):.3f} at {name}" for name, v in lines.items())
    chart = curve_chart(lines, f"Precision over recall: AP {means}")
    small = []
    for c in analysis.classes:
        if c.precision is not None:
            name = f"{c.name}, AP50 {shown(c.AP50)}"
            of_class = curve_chart({"": c.precision}, name, width=180, axes=False)
            small.append(f"<figure>{of_class}<figcaption>{escape(name)}</figcaption></figure>")
    return (
        f"<h2>Precision and recall</h2><figure>{chart}"
        f"<figcaption>Mean over the classes. AP {means}.</figcaption></figure>"
        "<details><summary>Each class, at IoU 0.5</summary>"
        f'<div class="grid">{"".join(small)}</div></details>'
    )


def _classes(analysis: Analysis) -> str:
    header = ["class", "objects", "AP", "", "AP50", "threshold", "precision", "recall", "F1"]
    rows, wrong = [], []
    for c in analysis.classes:
        t = c.threshold
        best = [shown(v) for v in ((t.score, t.precision, t.recall, t.f1) if t else [None] * 4)]
        name = escape(c.name)
        rows.append([name, str(c.boxes), shown(c.AP), bar(c.AP, 1.0), shown(c.AP50), *best])
        wrong.append([name, *(str(c.errors[kind]) for kind in KINDS)])
    return (
        "<h2>Classes</h2><p>The threshold has the best F1 at an IoU of 0.5; precision and recall "
        "are those at the threshold.</p>"
        + table("Each class", header, rows)
        + "<p></p>"
        + table("Wrong detections above the threshold, by kind", ["class", *KINDS], wrong)
    )


def _confusion(analysis: Analysis) -> str:
    text = (
        "<h2>Which class is taken for which</h2><p>At an IoU of 0.5 and each class's best "
        "threshold. Rows: what is there; columns: what was detected.</p>"
    )
    names = [escape(c.name) for c in analysis.classes]
    if len(names) > _MOST_IN_MATRIX:
        rows = [[escape(a), escape(b), str(n)] for a, b, n in analysis.most_confused(40)]
        return text + table(
            "Most frequent confusions (the whole matrix is in analysis.json)",
            ["true class", "detected as", "times"],
            rows,
        )
    matrix = np.array(analysis.confusion)
    most = int(matrix.max(initial=0))
    rows = [
        [name, *(heat(int(n), most, right=i == j) for j, n in enumerate(matrix[i]))]
        for i, name in enumerate([*names, "no object"])
    ]
    rows[-1][-1] = "<td></td>"
    header = ["true class", *names, "not found"]
    return text + table("Confusion matrix", header, rows, kind="heat")


def _by_objects(analysis: Analysis) -> str:
    if not analysis.by_objects:
        return "<h2>Crowded images</h2><p>No objects to find: n/a.</p>"
    rows = [
        [b.objects, str(b.images), shown(b.AP), bar(b.AP, 1.0), shown(b.AP50)]
        for b in analysis.by_objects
    ]
    return "<h2>Crowded images</h2>" + table(
        "AP by the number of objects in the image",
        ["objects", "images", "AP", "", "AP50"],
        rows,
    )


def _worst(analysis: Analysis, images: Mapping[int, Image.Image]) -> str:
    rows = [
        [escape(w.file_name) or str(w.image_id), str(w.image_id), shown(w.lost, 2), str(w.objects),
         str(w.missed), str(w.false_alarms)]
        for w in analysis.worst
    ]  # fmt: skip
    figures = []
    for w in analysis.worst:
        if w.image_id in images:
            text = (
                f"{w.file_name or w.image_id}: {w.missed} missed, {w.false_alarms} false alarms; "
                "found left, truth right"
            )
            figure = embedded(images[w.image_id], text)
            figures.append(f"<figure>{figure}<figcaption>{escape(text)}</figcaption></figure>")
    return (
        "<h2>Worst images</h2><p>Score lost: an object loses 1 less the score it was found with, "
        "a false alarm above its class's threshold loses its score.</p>"
        + table(
            "Images by lost score",
            ["image", "id", "score lost", "objects", "missed", "false alarms"],
            rows,
        )
        + "".join(figures)
    )
