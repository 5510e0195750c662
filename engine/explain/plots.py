"""An explanation as plots: one for each query or token."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from engine.explain.explanation import ExplainedQuery, Explanation, Floats, Sampling
from engine.explain.page import RAMP, level_colour, title_of
from util.files import atomic_path

_CELLS = 1.5, 2.4  # inches: the minimum and maximum side of a head's cell
_WIDE = 4.6  # inches: a view of the whole image
_LARGEST = 900  # pixels: the long side of what is drawn into a cell or view
_MOST_CELLS = 96
_OTHERS = 5  # queries that another takes from
_HEAVY = 0.01  # a weight that is looked at
_WEIGHTS = LinearSegmentedColormap.from_list("weights", RAMP)

Window = tuple[float, float, float, float]


def write_plot(path: Path, explanation: Explanation, item: int, image: Image.Image) -> None:
    """Draw an item as PNG: the last layer as a whole, then every head in every layer.

    Of a model with very many heads and layers, the last layers alone are drawn head by head.
    """
    is_query = item < len(explanation.queries)
    query = explanation.queries[item] if is_query else None
    if query is None:
        assert explanation.token is not None
        sampling = explanation.token.sampling
    else:
        sampling = query.sampling
    layers, heads = sampling.weights.shape[:2]
    drawn = max(1, min(layers, _MOST_CELLS // heads))
    views = 2 + (query is not None)
    side = min(max(views * _WIDE / heads, _CELLS[0]), _CELLS[1])
    width = max(views * _WIDE, heads * side + 0.6)
    tall = min(max(image.height / image.width, 0.4), 1.6) * width / views + 0.5
    figure = Figure(figsize=(width, tall + drawn * side + 0.9), dpi=100, layout="constrained")
    title = title_of(explanation, item).replace("$", r"\$")  # no dollar starts a formula
    figure.suptitle(f"{title}: where it looked", fontsize=13)
    halves = figure.subfigures(2, 1, height_ratios=[tall, drawn * side + 0.3], squeeze=False)
    top, bottom = halves[:, 0]
    panels = top.subplots(1, views, squeeze=False)[0]
    whole = (0.0, 0.0, float(image.width), float(image.height))
    last = sampling.layers[-1]
    for axes, by_level in zip(panels, (False, True), strict=False):
        _show(axes, image, whole)
        what = "level" if by_level else "weight"
        axes.set_title(f"layer {last}, all heads, by {what}", fontsize=10)
        _points(axes, sampling, -1, None, by_level=by_level, area=160)
        if query is not None:
            _box(axes, query.boxes[-1], "white", 1.5)
    _level_key(panels[1], explanation)
    if query is not None:
        _show(panels[2], image, whole)
        _through_layers(panels[2], explanation, query)
    window = _window(sampling, query, image.size)
    cells = bottom.subplots(drawn, heads, squeeze=False)
    for row, layer in enumerate(range(layers - drawn, layers)):
        for head in range(heads):
            axes = cells[row, head]
            _show(axes, image, window)
            _points(axes, sampling, layer, head, by_level=True, area=90)
            if row == 0:
                axes.set_title(f"head {head}", fontsize=9)
        cells[row, 0].set_ylabel(f"layer {sampling.layers[layer]}", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _show(axes: Axes, image: Image.Image, window: Window) -> None:
    """Draw the part of an image that is in a window (left, top, right, bottom) of pixels."""
    left, top, right, bottom = (round(side) for side in window)
    part = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    part.thumbnail((_LARGEST, _LARGEST))
    axes.imshow(np.asarray(part), extent=(left, max(right, left + 1), max(bottom, top + 1), top))
    axes.set(xticks=[], yticks=[], xlim=(window[0], window[2]), ylim=(window[3], window[1]))


def _points(
    axes: Axes, sampling: Sampling, layer: int, head: int | None, *, by_level: bool, area: float
) -> None:
    """Draw the points of a layer and head (None: of all), larger where they weigh more."""
    part = slice(None) if head is None else slice(head, head + 1)
    points, weights = sampling.points[layer, part], sampling.weights[layer, part]
    levels = np.broadcast_to(np.arange(weights.shape[1])[:, None], weights.shape).ravel()
    shares = (weights / max(weights.max(), 1e-9)).ravel()
    order = shares.argsort()  # heavy ones on top
    colours = [
        level_colour(int(i)) if by_level else _WEIGHTS(s)
        for i, s in zip(levels, shares, strict=True)
    ]
    x, y = points.reshape(-1, 2)[order].T
    axes.scatter(
        x,
        y,
        s=area * shares[order] + 2,
        c=[colours[i] for i in order],
        edgecolors="black",
        linewidths=0.5,
        alpha=0.9,
    )
    centre = sampling.references[layer, :2, None]
    axes.plot(*centre, "+", color="black", markersize=12, markeredgewidth=3)
    axes.plot(*centre, "+", color="#00e5ff", markersize=11, markeredgewidth=1.5)


def _box(axes: Axes, corners: Floats, colour: object, width: float, style: str = "-") -> None:
    x0, y0, x1, y1 = corners
    for ink, line in (("black", width + 1.5), (colour, width)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=ink, lw=line, ls=style))


def _through_layers(axes: Axes, explanation: Explanation, query: ExplainedQuery) -> None:
    """Draw a query's box after each layer, and those of the queries it takes most from."""
    mean = query.attention[-1].mean(0)
    for other in (-mean).argsort(kind="stable")[:_OTHERS]:
        if other != query.query:
            _box(axes, explanation.query_boxes[-1, other], "#ff5ad1", 1.0, ":")
    count = len(query.boxes)
    handles = []
    for layer, corners in enumerate(query.boxes):
        colour = _WEIGHTS(0.15 + 0.85 * (layer + 1) / count)
        _box(axes, corners, colour, 1.2)
        label = f"layer {layer}: {query.scores[layer]:.2f}"
        handles.append(Line2D([], [], color=colour, label=label))
    handles.append(Line2D([], [], color="#ff5ad1", ls=":", label="takes from"))
    axes.set_title("boxes and scores through the layers", fontsize=10)
    axes.legend(handles=handles, fontsize=7, loc="best", framealpha=0.8)


def _level_key(axes: Axes, explanation: Explanation) -> None:
    axes.legend(
        handles=[
            Line2D(
                [],
                [],
                ls="",
                marker="o",
                mec="black",
                mew=0.5,
                color=level_colour(i),
                label=f"level {i} ({height}x{width})",
            )
            for i, (height, width) in enumerate(explanation.level_shapes)
        ],
        fontsize=7,
        loc="best",
        framealpha=0.8,
    )


def _window(sampling: Sampling, query: ExplainedQuery | None, size: tuple[int, int]) -> Window:
    """Return a square part of the image with the points that count, and the box."""
    points = sampling.points[sampling.weights > _HEAVY].reshape(-1, 2)
    x, y = [*points[:, 0], *sampling.references[:, 0]], [*points[:, 1], *sampling.references[:, 1]]
    if query is not None:
        x += [query.xyxy[0], query.xyxy[2]]
        y += [query.xyxy[1], query.xyxy[3]]
    width, height = size
    spread = 1.1 * max(max(x) - min(x), max(y) - min(y), width / 25, height / 25)
    side = min(spread, float(min(width, height)))
    left = min(max((max(x) + min(x) - side) / 2, 0.0), width - side)
    top = min(max((max(y) + min(y) - side) / 2, 0.0), height - side)
    return left, top, left + side, top + side
