"""Parts of a page: tables, bars, charts as SVG, images as data."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from math import ceil

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6068; --line: #d9dce1;
  --paper: #ffffff; --panel: #f5f6f8; --bar: #2f6fb3; --c0: #1f6fb5; --c1: #c2570c; --c2: #22805a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a5abb4; --line: #3a3f46;
  --paper: #16181b; --panel: #1f2226; --bar: #6aa9e9; --c0: #6ab0f3;
  --c1: #f0a35e; --c2: #5fcf9f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
p { margin: .3rem 0 .8rem; color: var(--soft); max-width: 46rem; } a { color: var(--c0); }
.wide { overflow-x: auto; } .wide:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td.text { text-align: left; } td.text { min-width: 15rem; }
thead th { color: var(--soft); font-weight: 600;
  vertical-align: bottom; } tbody th { font-weight: 500; white-space: nowrap; }
.bar { display: inline-block; height: .7rem; background: var(--bar); vertical-align: middle;
  border-radius: 2px; min-width: 1px; } td.bars { text-align: left; min-width: 9rem; }
.heat td { text-align: center; min-width: 2.6rem; } .heat thead th { writing-mode: vertical-rl;
  transform: rotate(180deg); text-align: left; padding: .5rem .2rem; }
.heat thead th:first-child { writing-mode: horizontal-tb; transform: none; }
.told th:last-child { text-align: left; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; color: var(--soft); }
figure img { max-width: 100%; height: auto; border: 1px solid var(--line); }
svg { background: var(--panel); border-radius: 4px; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; }
.grid figure { margin: 0; } summary { cursor: pointer; margin: .6rem 0; }
"""


def shown(value: float | None, digits: int = 3) -> str:
    """Return a number for a reader; n/a where there is none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = ""
) -> str:
    """Return a table that may be scrolled sideways; cells are HTML, a row's first is its head."""
    head = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(map(_cell, rest))}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def bar(value: float | None, most: float) -> str:
    """Return a cell with a bar; the number itself stands in another cell."""
    width = 100 * (value or 0) / most if most else 0
    drawn = f'<span class="bar" style="width:{width:.1f}%"></span>' if width else ""
    return f'<td class="bars" aria-hidden="true">{drawn}</td>'


def heat(count: int, most: int, *, right: bool) -> str:
    """Return a cell coloured by its count, in one colour if right and another if wrong."""
    colour = "--c0" if right else "--c1"
    share = round(75 * count / most) if most else 0
    style = f"background:color-mix(in srgb, var({colour}) {share}%, transparent)" if count else ""
    return f'<td style="{style}">{count or "·"}</td>'


def curve_chart(
    lines: Mapping[str, Sequence[float]], description: str, *, width: int = 560, axes: bool = True
) -> str:
    """Return precision over recall, each line over evenly spaced recalls 0..1, as SVG."""
    left, bottom, top, pad = (48, 40, 32, 12) if axes else (6, 6, 6, 6)
    height = round(width * 0.62)
    across, up = width - left - pad, height - bottom - top

    def place(x: float, y: float) -> str:
        return f"{left + x * across:.1f},{top + (1 - y) * up:.1f}"

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        for a, b in ((place(tick, 0), place(tick, 1)), (place(0, tick), place(1, tick))):
            (x1, y1), (x2, y2) = a.split(","), b.split(",")
            parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="var(--line)"/>')
        if axes:
            x, y = place(tick, 0).split(",")
            parts.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{tick:g}</text>')
            x, y = place(0, tick).split(",")
            parts.append(
                f'<text x="{left - 6}" y="{float(y) + 4}" text-anchor="end">{tick:g}</text>'
            )
    for i, (name, values) in enumerate(lines.items()):
        points = " ".join(place(j / (len(values) - 1), v) for j, v in enumerate(values))
        dashes = ("none", "7 4", "2 3")[i % 3]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="var(--c{i % 3})" stroke-width="2" '
            f'stroke-dasharray="{dashes}"/>'
        )
        if axes:
            start = left + i * across // len(lines)
            parts.append(
                f'<line x1="{start}" x2="{start + 30}" y1="16" y2="16" stroke-width="2" '
                f'stroke="var(--c{i % 3})" stroke-dasharray="{dashes}"/>'
                f'<text x="{start + 36}" y="20">{escape(name)}</text>'
            )
    if axes:
        parts.append(
            f'<text x="{left + across / 2}" y="{height - 6}" text-anchor="middle">recall</text>'
        )
        parts.append(
            f'<text x="12" y="{top + up / 2}" text-anchor="middle" '
            f'transform="rotate(-90 12 {top + up / 2})">precision</text>'
        )
    return (
        f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{"".join(parts)}</svg>'
    )


def column_chart(
    labels: Sequence[str],
    series: Mapping[str, Sequence[int]],
    description: str,
    *,
    across: str,
    width: int = 560,
) -> str:
    """Return columns over `labels` as SVG: what share of each series' total falls there."""
    left, top, bottom, height = 48, 32, 52, 260
    step = (width - left - 8) / len(labels)
    up, wide = height - top - bottom, step * 0.8 / max(1, len(series))
    shares = {n: [c / max(1, sum(counts)) for c in counts] for n, counts in series.items()}
    most = ceil(5 * max((max(s) for s in shares.values()), default=0)) / 5 or 1  # round numbers
    parts = []
    for part in (0, 0.5, 1):
        y = top + (1 - part) * up
        parts.append(
            f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{100 * part * most:.3g}%</text>"
        )
    for i, (name, counts) in enumerate(series.items()):
        start = left + i * 120
        parts.append(
            f'<rect x="{start}" y="10" width="12" height="12" fill="var(--c{i % 3})"/>'
            f'<text x="{start + 18}" y="20">{escape(name)}</text>'
        )
        for j, count in enumerate(counts):
            tall = up * shares[name][j] / most
            x = left + j * step + step * 0.1 + i * wide
            parts.append(
                f'<rect x="{x:.1f}" y="{top + up - tall:.1f}" width="{wide:.1f}" '
                f'height="{tall:.1f}" fill="var(--c{i % 3})">'
                f"<title>{escape(name)}, {escape(labels[j])}: {count}</title></rect>"
            )
    for j, label in enumerate(labels):
        parts.append(
            f'<text x="{left + (j + 0.5) * step:.1f}" y="{top + up + 18}" '
            f'text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(
        f'<text x="{left + (width - left) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{escape(across)}</text>"
    )
    return (
        f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{"".join(parts)}</svg>'
    )


def image(image: Image.Image, description: str, *, width: int = 960) -> str:
    """Return an image inside the page, made smaller if it is wider."""
    image = image.convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    code = base64.b64encode(data.getvalue()).decode()
    return (
        f'<img loading="lazy" width="{image.width}" height="{image.height}" '
        f'alt="{escape(description)}" src="data:image/jpeg;base64,{code}">'
    )
