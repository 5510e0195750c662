"""An analysis as one page that needs nothing else."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from engine.evaluation.analysis import Analysis
from engine.evaluation.errors import KINDS, by_cost
from util.files import write_atomic
from util.html import inline_image, render, svg
from util.plot import curve_chart


def save_report(
    output_dir: Path, analysis: Analysis, images: Mapping[int, Image.Image], *, title: str
) -> None:
    """Write `eval/report.html`; `images`, by image id, are shown with the worst."""
    page = report(analysis, images, title=title)
    write_atomic(output_dir / "eval" / "report.html", page, errors="backslashreplace")


def report(analysis: Analysis, images: Mapping[int, Image.Image], *, title: str) -> str:
    """Return the page: HTML with its styles, charts and images inside."""
    lines = {f"IoU {iou}": values for iou, values in analysis.curves.items()}
    mean_ap = ", ".join(f"{np.mean(values):.3f} at {name}" for name, values in lines.items())
    return render(
        Path(__file__).with_name("report.html.j2"),
        title=f"Evaluation: {title}",
        analysis=analysis,
        result=analysis.result.to_json(),
        errors=by_cost(analysis.errors),
        kinds=KINDS,
        mean_ap=mean_ap,
        chart=svg(curve_chart(lines), f"Precision over recall: AP {mean_ap}") if lines else None,
        images={image_id: inline_image(image) for image_id, image in images.items()},
    )
