"""An explanation as one page, which works from disk and draws what is chosen on it."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.colors import to_hex
from PIL import Image

from engine.explain.explanation import Explanation, Floats, Sampling
from util.console import short_name
from util.files import write_atomic
from util.html import inline_image, render

_TEMPLATE = Path(__file__).with_name("page.html.j2")
INTRODUCTION = (
    "Deformable attention reads each feature map at a few points around a reference, and adds up "
    "what it finds there by weight. Points are where it reads; their area shows the weight."
)
_TAKEN = 8  # queries that another takes from, of each head
LEVEL_COLOURS = (
    "#ffb000", "#2f9bff", "#ff4f79", "#38d996", "#b98cff", "#fe7f2d", "#a8e10c", "#00c9d1",
)  # fmt: skip
RAMP = tuple(to_hex(matplotlib.colormaps["plasma"](i / 15)) for i in range(16))
"""Colours from the smallest weight to the largest."""


def level_colour(level: int) -> str:
    """Return the colour of a level's points."""
    return LEVEL_COLOURS[level % len(LEVEL_COLOURS)]


def title_of(explanation: Explanation, item: int) -> str:
    """Return what an item is called; the token comes after the queries."""
    if item < len(explanation.queries):
        query = explanation.queries[item]
        return f"{short_name(query.name)} {query.score:.2f} (query {query.query})"
    token = explanation.token
    assert token is not None
    return f"encoder token: level {token.level}, row {token.row}, column {token.column}"


def write_page(
    path: Path, explanation: Explanation, image: Image.Image, *, name: str, introduction: str
) -> None:
    """Write the page; `name` is the image's."""
    page = page_of(explanation, image, name=name, introduction=introduction)
    write_atomic(path, page, errors="backslashreplace")


def page_of(explanation: Explanation, image: Image.Image, *, name: str, introduction: str) -> str:
    """Return the page, which is HTML and needs nothing else."""
    width, height = explanation.size
    count = len(explanation.queries) + (explanation.token is not None)
    text = json.dumps(_content(explanation), separators=(",", ":")).replace("<", "\\u003c")
    return render(
        _TEMPLATE,
        title=f"What the model looked at: {name}",
        introduction=introduction,
        names=[title_of(explanation, i) for i in range(count)],
        image=inline_image(image, max_width=1600),
        width=width,
        height=height,
        data=Markup(text),
    )


def _content(explanation: Explanation) -> dict[str, Any]:
    """Return what the script draws: pixels to a tenth, weights to five digits."""
    items: list[dict[str, Any]] = []
    boxes: list[dict[int, list[float]]] = [{} for _ in explanation.query_boxes]
    for query in explanation.queries:
        taken = [_most(of_layer) for of_layer in query.attention]
        for layer, lists in enumerate(taken):
            for other, _ in (pair for pairs in lists for pair in pairs):
                boxes[layer][other] = _rounded(explanation.query_boxes[layer, other], 1)
        items.append(
            {
                **_sampled(query.sampling),
                "boxes": _rounded(query.boxes, 1),
                "scores": _rounded(query.scores, 5),
                "taken": taken,
            }
        )
    if explanation.token is not None:
        items.append(_sampled(explanation.token.sampling))
    return {
        "size": explanation.size,
        "levels": explanation.level_shapes,
        "colours": [level_colour(i) for i in range(len(explanation.level_shapes))],
        "ramp": RAMP,
        "items": items,
        "boxes": boxes,
    }


def _sampled(sampling: Sampling) -> dict[str, Any]:
    return {
        "layers": sampling.layers.tolist(),
        "points": _rounded(sampling.points, 1),
        "weights": _rounded(sampling.weights, 5),
        "references": _rounded(sampling.references, 1),
    }


def _most(attention: Floats) -> list[list[tuple[int, float]]]:
    """Return the queries that weigh most for each head, and last those of their mean."""
    rows = [*attention, attention.mean(0)]
    order = [(-row).argsort(kind="stable")[:_TAKEN] for row in rows]
    return [
        [(int(i), round(float(row[i]), 5)) for i in best]
        for row, best in zip(rows, order, strict=True)
    ]


def _rounded(values: Floats, digits: int) -> Any:
    return values.round(digits).tolist()
