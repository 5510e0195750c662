"""Pages of one file: a jinja2 template with charts and images inside."""

import base64
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from util.plot import THEME


def render(template: Path, **values: Any) -> str:
    """Fill a template, which may extend `base.html.j2`; values are escaped unless `Markup`."""
    page = _environment(template.parent).get_template(template.name)
    return page.render(theme=THEME, number=number, **values)


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for a reader; n/a where there is none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def svg(figure: Figure, description: str) -> Markup:
    """Return a chart to put into a page; the colours of `THEME` follow the page's."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    chart = file.getvalue().partition("<svg")[2]
    # pixels, not points; a group that is called "name: count" gets that as its tooltip
    chart = re.sub(r'(height|width)="([\d.]+)pt"', r'\1="\2"', chart, count=2)
    chart = re.sub(r'<g id="([^"]*: \d+)">', r"<g><title>\1</title>", chart)
    chart = re.sub(r'<g id="[^"]*"', "<g", chart)  # of several charts they would repeat
    for name, colour in THEME.items():
        chart = chart.replace(colour, f"var(--{name})")
    return Markup(f'<svg role="img" aria-label="{escape(description)}"{chart}')


@dataclass(frozen=True)
class InlineImage:
    """An image as a data URL, and its size in pixels."""

    url: str
    width: int
    height: int


def inline_image(image: Image.Image, *, max_width: int = 960) -> InlineImage:
    """Return an image to put into a page, made smaller if it is wider."""
    image = image.convert("RGB")
    if image.width > max_width:
        image = image.resize((max_width, round(image.height * max_width / image.width)))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    code = base64.b64encode(data.getvalue()).decode()
    return InlineImage(f"data:image/jpeg;base64,{code}", *image.size)
