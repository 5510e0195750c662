"""A page to try a detector on images of one's own; `main.py app` serves it by gradio."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from PIL import Image

from datasets.images import READ_ERRORS, read_rgb
from engine.detector import DEFAULT_THRESHOLD, Box, Detector
from engine.explain.page import INTRODUCTION, page_of, title_of
from engine.predictions import with_boxes
from util.console import in_line, short_name
from util.errors import DataError, UserError

_KEPT = 3600, 24 * 3600  # seconds: how often dropped images are looked through, how old they get
_LARGEST_UPLOAD = 2**28  # bytes
_STYLE = """
footer { display: none; }
#looked iframe { width: 100%; height: 66rem; border: 1px solid var(--border-color-primary); }
"""


class Found(NamedTuple):
    """An image that was dropped, and its boxes of every score, best first."""

    path: str
    boxes: list[Box]


class Trial:
    """A detector behind a page: however many ask, it sees one image at a time."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self._lock = Lock()

    @property
    def has_thresholds(self) -> bool:
        """Whether the checkpoint has score thresholds for its classes."""
        return bool(self.detector.thresholds)

    def find(self, path: str) -> Found:
        """Return what is found in an image.

        Raises:
            DataError: it cannot be read.
        """
        with self._lock:
            ((_, boxes),) = self.detector.detect(
                [Path(path)], skip_unreadable=False, tiling=self.detector.tiling
            )
        return Found(path, boxes)

    def shown(self, boxes: Sequence[Box], threshold: float | None) -> list[Box]:
        """Return the boxes that count, by one threshold or, without, by that of each class."""
        minimum = self.detector.min_scores(threshold)
        return [box for box in boxes if box.score >= minimum[box.name]]

    def drawn(self, path: str, shown: Sequence[Box]) -> Image.Image:
        """Return the upright image with boxes.

        Raises:
            DataError: it is no longer kept.
        """
        return with_boxes(_kept(path), shown, self.detector.classes)

    def looked(self, path: str, threshold: float | None, box: int) -> str:
        """Return HTML that shows where the model looked for one of the boxes that are shown.

        Of a model that has no sampling points, and of an image that is cut, it says why.
        """
        try:
            image = _kept(path)
            with self._lock:
                explanation = self.detector.explain(path, threshold, box=box)
        except UserError as error:
            return _line(str(error))
        page = page_of(explanation, image, name=title_of(explanation, 0), introduction=INTRODUCTION)
        # in a sandbox it has scripts, and nothing of this page
        return (
            f'<iframe title="Where the model looked" sandbox="allow-scripts" '
            f'srcdoc="{escape(page)}"></iframe>'
        )


def _kept(path: str) -> Image.Image:
    """Return an image that could be read before.

    Raises:
        DataError: it was deleted, as all are after a while.
    """
    try:
        return read_rgb(Path(path), None)
    except READ_ERRORS as error:
        raise DataError(f"{Path(path).name}: is no longer kept. Drop the image again.") from error


def _line(text: str) -> str:
    return f'<p role="status">{escape(in_line(text))}</p>'


def box_at(shown: Sequence[Box], x: float, y: float) -> int | None:
    """Return the position of the smallest box around a pixel; None if there is none."""
    areas = {
        (x1 - x0) * (y1 - y0): i
        for i, (x0, y0, x1, y1) in reversed([*enumerate(box.xyxy for box in shown)])
        if x0 <= x <= x1 and y0 <= y <= y1
    }
    return areas[min(areas)] if areas else None


def summary(shown: Sequence[Box]) -> str:
    """Return how many boxes there are, in all and by class, most frequent first."""
    counts = Counter(box.name for box in shown)
    by_class = ", ".join(f"{short_name(name)} {count}" for name, count in counts.most_common())
    return f"{len(shown)} box{'' if len(shown) == 1 else 'es'}{': ' * bool(shown)}{by_class}"


def _handlers(trial: Trial) -> tuple[Callable[..., Any], ...]:
    """Return what the page does to take an image, draw it, find a clicked box, and explain it."""
    import gradio

    nothing = gradio.Dropdown(choices=[], value=None)

    def minimum(by_class: bool, threshold: float) -> float | None:
        return None if by_class and trial.has_thresholds else threshold

    def draw(found: Found | None, by_class: bool, threshold: float) -> Any:
        if found is None:
            return None, "", nothing, ""
        shown = trial.shown(found.boxes, minimum(by_class, threshold))
        choices = [(f"{box.name} {box.score:.2f}", i) for i, box in enumerate(shown)]
        try:
            marked = trial.drawn(found.path, shown)
        except UserError as error:
            return None, _line(str(error)), nothing, ""
        return marked, _line(summary(shown)), gradio.Dropdown(choices=choices, value=None), ""

    def take(path: str | None, by_class: bool, threshold: float) -> Any:
        try:
            found = trial.find(path) if path else None
        except UserError as error:
            folder = str(Path(path or "").parent)  # a temporary one, of no interest
            return None, None, _line(str(error).replace(f"{folder}{os.sep}", "")), nothing, ""
        return found, *draw(found, by_class, threshold)

    def pick(
        found: Found | None, by_class: bool, threshold: float, event: gradio.SelectData
    ) -> int | None:
        boxes = found.boxes if found else []
        return box_at(trial.shown(boxes, minimum(by_class, threshold)), *event.index)

    def look(found: Found | None, by_class: bool, threshold: float, box: int | None) -> str:
        if found is None or box is None:
            return ""
        return trial.looked(found.path, minimum(by_class, threshold), box)

    return take, draw, pick, look


def build_page(trial: Trial, *, title: str, threshold: float | None) -> Any:
    """Return the page, gradio's `Blocks`; the slider begins at `threshold`."""
    import gradio

    take, draw, pick, look = _handlers(trial)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=_KEPT) as page:
        gradio.Markdown(f"# {title}")
        # of the image that was read last: what lies in the page may already be the next one
        found = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                image = gradio.Image(
                    label="Drop an image here",
                    sources=["upload", "clipboard"],
                    elem_id="image",
                    buttons=[],
                )
                # the file as it was dropped: what cannot be read is for us to say
                image.preprocess = lambda file: file.path if file else None
                by_class = gradio.Checkbox(
                    value=trial.has_thresholds and threshold is None,
                    visible=trial.has_thresholds,
                    elem_id="by_class",
                    label="The best minimum of each class, as the checkpoint has it",
                )
                slider = gradio.Slider(
                    0,
                    1,
                    DEFAULT_THRESHOLD if threshold is None else threshold,
                    step=0.01,
                    label="Minimum score of all classes",
                    elem_id="threshold",
                )
                chosen = gradio.Dropdown(
                    choices=[],
                    elem_id="chosen",
                    label="Where did it look? Click a box in the image, or choose it here",
                )
            with gradio.Column(scale=2, min_width=320):
                result = gradio.Image(
                    label="What was found",
                    interactive=False,
                    format="jpeg",
                    elem_id="result",
                    buttons=["download", "fullscreen"],
                )
                status = gradio.HTML(elem_id="status")
        looked = gradio.HTML(elem_id="looked")
        # one after another, or the late result of an image would replace that of the next
        hidden: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "page"}
        drawn = [result, status, chosen, looked]
        image.change(take, [image, by_class, slider], [found, *drawn], **hidden)
        latest = {"trigger_mode": "always_last", "show_progress": "hidden", **hidden}
        slider.input(lambda: False, None, by_class, **latest)
        changed = [slider.change, by_class.change]
        gradio.on(changed, draw, [found, by_class, slider], drawn, **latest)
        result.select(pick, [found, by_class, slider], chosen, **hidden)
        chosen.change(look, [found, by_class, slider, chosen], looked, **hidden)
    return page


def serve(page: Any, *, host: str, port: int | None) -> str:
    """Serve a page to this machine alone, or to others by a `host` of its own; return its address.

    Raises:
        OSError: the port is in use.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=_LARGEST_UPLOAD,
        css=_STYLE,
    )
    return str(address)
