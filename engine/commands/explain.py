"""`main.py explain`: where the model looked for what it found in an image."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.detection import WEIGHTS, SizeOptions
from configs.load import Given
from configs.options import Checked, option
from configs.tiles import TileOptions
from datasets.images import read_rgb
from engine.detector import Detector
from engine.explain.explanation import Explanation
from engine.explain.page import INTRODUCTION, title_of, write_page
from engine.explain.plots import write_plot
from util.console import console
from util.errors import ConfigError
from util.files import make_output_dir, refuse_overwriting, write_atomic

_NUMBER = r"\d{1,9}(?:\.\d{0,9})?"


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(Checked):
    """What `explain` needs; everything else is in the checkpoint."""

    checkpoint: str = option("", WEIGHTS)
    input: str = option("", "the image")
    output_dir: str = option("", "folder for explain.html and plots")
    box: int | None = option(
        None, "explain this detection, counted from 0, best first", low=0, most=10**6
    )
    query: int | None = option(
        None, "explain this query of the model, counted from 0", low=0, most=10**6
    )
    point: str = option("", "explain the smallest detection around x,y, pixels of the image")
    class_name: str = option("", "explain detections of this class alone", alias="class")
    count: int = option(5, "detections to explain where none is chosen", low=1, most=50)
    token: str = option(
        "", "explain also the encoder's cell at x,y or x,y,level, pixels; level 0 is the finest"
    )
    score_threshold: float | None = option(
        None,
        "minimum score (default: per-class thresholds from the checkpoint, else 0.3)",
        low=0,
        high=1,
        alias="threshold",
    )
    json: bool = option(False, "write the numbers as explanation.json, too")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")


SECTIONS = {"explain": ExplainOptions, "sizes": SizeOptions, "tiles": TileOptions}
DEFAULTS = {"sizes": "the checkpoint's", "tiles": "as in the checkpoint's training"}


def main(options: ExplainOptions, sizes: SizeOptions, given: Given) -> int:
    """Write a page and plots of where the model looked in an image."""
    if not options.input or not options.output_dir:
        raise ConfigError("explain: give `input IMAGE` and `output_dir DIR`.")
    point = numbers("point", options.point, (2,))
    token = numbers("token", options.token, (2, 3))
    path, folder = Path(options.input), Path(options.output_dir)
    if not path.is_file():
        raise ConfigError(f"input {path}: there is no such file. Give one image.")
    detector = Detector.load(options.checkpoint, device=options.device, **asdict(sizes))
    detector.take(given)
    explanation = detector.explain(
        path,
        options.score_threshold,
        box=options.box,
        query=options.query,
        point=(point[0], point[1]) if point else None,
        class_name=options.class_name or None,
        count=options.count,
        token=(token[0], token[1], int(token[2]) if token[2:] else 0) if token else None,
    )
    write(explanation, path, folder, numbers_too=options.json)
    return 0


def numbers(name: str, text: str, counts: tuple[int, ...]) -> tuple[float, ...] | None:
    """Return the numbers of an option, which are separated by commas; None where it is not given.

    Raises:
        ConfigError: it holds something else, too many or too few numbers, or a fractional level.
    """
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    whole = parts[2:]
    if (
        len(parts) not in counts
        or not all(re.fullmatch(_NUMBER, part) for part in parts)
        or any(not part.isdigit() for part in whole)
    ):
        wanted = "x,y" if counts == (2,) else "x,y or x,y,level"
        raise ConfigError(
            f"{name}: must be {wanted}, in pixels of the image, not '{text[:60]}'. "
            "Write, for instance, 120,80."
        )
    return tuple(float(part) for part in parts)


def write(explanation: Explanation, path: Path, folder: Path, *, numbers_too: bool) -> None:
    """Write the page, a plot of each query or token, and the numbers if they are wanted.

    Raises:
        ConfigError: a file would overwrite the image, or the folder cannot be used.
    """
    plots = [f"query_{query.query:03d}.png" for query in explanation.queries]
    if explanation.token is not None:
        plots.append("token.png")
    names = ["explain.html", *plots, *(["explanation.json"] if numbers_too else [])]
    refuse_overwriting([path], [folder / name for name in names])
    make_output_dir(folder)
    image = read_rgb(path, None)
    write_page(
        folder / "explain.html", explanation, image, name=path.name, introduction=INTRODUCTION
    )
    for item, name in enumerate(plots):
        write_plot(folder / name, explanation, item, image)
    if numbers_too:
        text = json.dumps(explanation.to_json(), ensure_ascii=False)
        write_atomic(folder / "explanation.json", f"{text}\n", errors="backslashreplace")
    titles = "; ".join(title_of(explanation, item) for item in range(len(plots)))
    console(f"explained: {titles}\nwritten to {folder}: {', '.join(names)}")
