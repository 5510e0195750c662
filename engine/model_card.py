"""What a folder for a hub says of a detector: a card with a header for machines, and its parts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.evaluation.evaluator import STAT_NAMES
from util.classes import Classes
from util.console import in_line
from util.version import __version__

_LIBRARY = "deformable-detr"
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|#&~!]")  # what would format a name, or be read as HTML
_MOST_CLASSES = 200  # in a table; the others are in the description
_TITLES = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Measured:
    """COCO's numbers by name, and those of classes as `results.json` has them; both may lack some.

    `on` says what they were measured on.
    """

    on: str = ""
    stats: Mapping[str, float] = field(default_factory=dict)
    per_class: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Card:
    """What is known of a detector and its folder.

    `repo` is USER/NAME. `lacking` is what keeps transformers from loading the folder, after "no";
    "" where it loads. `counts` are the (images, boxes) by split. `options` is a file of the
    folder with the options of the run, `image` its example; "" without.
    """

    repo: str
    classes: Classes
    thresholds: Mapping[str, float]
    backbone: str
    weights: int
    image_size: tuple[int, int]
    lacking: str = ""
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    options: str = ""
    image: str = ""
    license: str = ""

    def text(self) -> str:
        """Return the card, `README.md` of the folder."""
        parts = (
            self._header(),
            self._about(),
            self._use(),
            self._classes(),
            self._results(),
            self._training(),
        )
        return "\n\n".join(parts) + "\n"

    def _header(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData  # slow to import

        on, name = self.measured.on, self.repo.partition("/")[2]
        results = [
            EvalResult(
                task_type="object-detection",
                dataset_type="custom",
                dataset_name=on,
                metric_type="mean_average_precision" if metric == "AP" else metric,
                metric_name=metric,
                metric_value=round(self.measured.stats[metric], 4),
            )
            for metric in ("AP", "AP50")
            if metric in self.measured.stats
        ]
        header = ModelCardData(
            library_name=_LIBRARY if self.lacking else "transformers",
            license=self.license or None,
            pipeline_tag="object-detection",
            tags=["object-detection", "deformable-detr"],
            model_name=name if results else None,
            eval_results=results or None,
        )
        return f"---\n{header.to_yaml()}\n---"

    def _about(self) -> str:
        names = [plain(self.classes.shown(i)) for i in self._labels()]
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
        short, long = self.image_size
        lines = [
            f"# {plain(self.repo.partition('/')[2])}",
            f"A [Deformable DETR](https://arxiv.org/abs/2010.04159) detector of {shown}. Its "
            f"backbone is {plain(self.backbone)}, and it has {self.weights:,} weights. Images are "
            f"resized to a short side of {short} pixels, and a long side of at most {long}.",
        ]
        if self.image:
            lines.append(f"![What the detector finds in an image]({self.image})")
        return "\n\n".join(lines)

    def _use(self) -> str:
        text = f"""## Use

With {_LIBRARY} {__version__} or later:

```python
from deformable_detr import Detector

detector = Detector.load("{self.repo}")
for box in detector.predict("photo.jpg"):
    print(box.name, box.score, box.xyxy)
```

```
deformable-detr predict --checkpoint {self.repo} --input photos/ --output_dir found
```
"""
        if self.lacking:
            missing = plain(self.lacking)
            return f"{text}\n`transformers` has no {missing}, and so cannot load this model."
        return f"""{text}
With `transformers`:

```python
from transformers import AutoImageProcessor, DeformableDetrForObjectDetection

processor = AutoImageProcessor.from_pretrained("{self.repo}")
model = DeformableDetrForObjectDetection.from_pretrained("{self.repo}")
```"""

    def _classes(self) -> str:
        results = {str(row.get("name")): row for row in self.measured.per_class}
        labels = self._labels()
        rows = []
        for label in labels[:_MOST_CLASSES]:
            name = self.classes.shown(label)
            found = results.get(name, {})
            rows.append(
                (
                    plain(name),
                    plain(str(self.classes.given_id(label))),
                    _number(self.thresholds.get(name), 2),
                    _number(found.get("AP")),
                    _number(found.get("AP50")),
                    found.get("num_boxes", "n/a"),
                )
            )
        header = ("class", "category id", "best score threshold", "AP", "AP50", "boxes measured on")
        used = [c for c in range(6) if c < 2 or any(row[c] != "n/a" for row in rows)]
        text = _table([[row[c] for c in used] for row in [header, *rows]])
        rest = len(labels) - len(rows)
        more = f"\n\nAnd {rest} more classes, which `deformable_detr.json` lists." if rest else ""
        return f"## Classes\n\n{text}{more}"

    def _results(self) -> str:
        stats = self.measured.stats
        rows = [(name, _number(stats[name])) for name in STAT_NAMES if name in stats]
        if not rows:
            return "## Results\n\nNone are recorded with these weights."
        table = _table([("COCO metric", "value"), *rows])
        return f"## Results\n\nOn {plain(self.measured.on)}:\n\n{table}"

    def _training(self) -> str:
        lines = ["## Training"]
        if self.counts:
            rows = [
                (_TITLES.get(split, split), f"{images:,}", f"{boxes:,}")
                for split, (images, boxes) in self.counts.items()
            ]
            lines.append(_table([("data", "images", "boxes"), *rows]))
        else:
            lines.append("How many images it was trained on is not recorded with these weights.")
        if self.options:
            lines.append(
                f"`{self.options}` holds the options of the run:\n\n```\ndeformable-detr train "
                f"--config {self.options} --data_path DIR --output_dir RUN\n```"
            )
        return "\n\n".join(lines)

    def _labels(self) -> list[int]:
        return [label for label in range(len(self.classes)) if self.classes.in_use(label)]


def plain(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", in_line(text))


def _number(value: Any, digits: int = 3) -> str:
    known = isinstance(value, (int, float)) and 0 <= value <= 1
    return f"{value:.{digits}f}" if known else "n/a"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
