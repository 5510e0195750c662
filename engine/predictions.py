"""What `predict` writes: copies, crops and lines as the images come, and one JSON at the end."""

import csv
import json
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from datasets.images import read_rgb
from engine.detector import Box
from util.classes import Classes
from util.draw import draw_boxes
from util.files import atomic_path

_KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")
BOX_COLUMNS = ("category_id", "category_name", "score", "x0", "y0", "x1", "y1")
_LONGEST_FOLDER = 200  # bytes; systems allow 255
_LONGEST_STEM = 50  # characters, of up to four bytes each


class PredictionFiles:
    """The files of a folder, which take the boxes of one image after another; a context manager.

    `predictions.jsonl` has a line per image as soon as the image is done, with all of its boxes.
    `predictions.json` is made of these lines in the end, ordered by image. Boxes that reach the
    score threshold of their class are *shown*: drawn, cropped, and rows of `predictions.csv`. Of an
    image only the place of its line stays in memory.
    """

    def __init__(
        self,
        output_dir: Path,
        names: Sequence[str],
        classes: Classes,
        thresholds: Mapping[str, float],
        *,
        drawn: Sequence[str] | None,
        table: bool,
        crops: bool,
    ) -> None:
        """Take the images' names, and those of the drawn copies if there are to be some."""
        self._folder, self._names, self._classes = output_dir, names, classes
        self._thresholds, self._drawn = thresholds, drawn
        self._crop_folders = crop_folders(list(thresholds)) if crops else {}
        self._places = array("q", [-1]) * len(names)  # where the line of an image begins
        self.images = self.boxes = 0
        with ExitStack() as opened:
            lines = (output_dir / "predictions.jsonl").open("w+", encoding="ascii", newline="\n")
            self._lines = opened.enter_context(lines)
            self._rows: Any = None
            if table:
                path = output_dir / "predictions.csv"
                self._rows = open_table(path, ("file_name", *BOX_COLUMNS), opened)
            self._opened = opened.pop_all()

    def __enter__(self) -> "PredictionFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def add(self, i: int, source: Path | Image.Image, boxes: Sequence[Box]) -> None:
        """Write what was found in the image of position `i`."""
        shown = [box for box in boxes if box.score >= self._thresholds[box.name]]
        if self._drawn is not None or (shown and self._crop_folders):
            image = read_rgb(source, None)
            if self._drawn is not None:
                self._draw(image, shown, self._folder / self._drawn[i])
            if self._crop_folders:
                # whatever the stem is, the two numbers are of no other crop
                stem = f"{Path(self._names[i]).stem[:_LONGEST_STEM]}_{i}"
                save_crops(image, shown, self._folder, self._crop_folders, stem)
        if self._rows is not None:
            self._rows.writerows(
                (self._names[i], *box_columns(box, self._classes)) for box in shown
            )
        found = plain_boxes(boxes, self._classes)
        line = json.dumps({"image_id": i, "file_name": self._names[i], "boxes": found})
        self._places[i] = self._lines.tell()
        self._lines.write(f"{line}\n")
        self._lines.flush()  # others may read along
        self.images += 1
        self.boxes += len(shown)

    def write_json(self) -> None:
        """Write `predictions.json`: COCO results with names, ordered by image and score."""
        path, begun = self._folder / "predictions.json", False
        with atomic_path(path) as part, part.open("w", encoding="ascii") as file:
            for place in self._places:
                if place < 0:
                    continue
                self._lines.seek(place)
                image = json.loads(self._lines.readline())
                image_id, name = image["image_id"], image["file_name"]
                entries = [{"image_id": image_id, "file_name": name, **b} for b in image["boxes"]]
                if entries:
                    file.write(",\n" if begun else "[\n")
                    file.write(json.dumps(entries, indent=1)[2:-2])
                    begun = True
            file.write("\n]\n" if begun else "[]\n")

    def _draw(self, image: Image.Image, shown: Sequence[Box], path: Path) -> None:
        drawn = with_boxes(image, shown, self._classes)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, quality=95)  # of JPEG; the suffix says which format


def open_table(path: Path, columns: Sequence[str], opened: ExitStack) -> Any:
    """Return the writer of a new CSV with a row of column names; `opened` closes the file."""
    file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
    rows = csv.writer(opened.enter_context(file))
    rows.writerow(columns)
    return rows


def box_columns(box: Box, classes: Classes) -> tuple[int | str | float, ...]:
    """Return a box as the cells of `BOX_COLUMNS`, corners in pixels."""
    return (classes.given_id(classes.label_of[box.category_id]), box.name, box.score, *box.xyxy)


def save_crops(
    image: Image.Image,
    boxes: Sequence[Box],
    output_dir: Path,
    folders: Mapping[str, str],
    stem: str,
) -> None:
    """Save the part of an image that each box shows, as `crops/CLASS/STEM_NUMBER.png`.

    `folders` has the folder's name of each class, see `crop_folders`.
    """
    for number, box in enumerate(boxes):
        x0, y0, x1, y1 = box.xyxy
        left, top = max(math.floor(x0), 0), max(math.floor(y0), 0)
        right, bottom = min(math.ceil(x1), image.width), min(math.ceil(y1), image.height)
        if left < right and top < bottom:
            folder = output_dir / "crops" / folders[box.name]
            folder.mkdir(parents=True, exist_ok=True)
            image.crop((left, top, right, bottom)).save(folder / f"{stem}_{number}.png")


def plain_boxes(boxes: Sequence[Box], classes: Classes) -> list[dict[str, Any]]:
    """Return boxes in plain values, `bbox` as x, y, width and height in pixels."""
    return [
        {
            "category_id": classes.given_id(classes.label_of[box.category_id]),
            "category_name": box.name,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": box.score,
        }
        for box in boxes
        for x0, y0, x1, y1 in [box.xyxy]
    ]


def with_boxes(
    image: Image.Image,
    boxes: Sequence[Box],
    classes: Classes,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """Return a copy of an image with boxes drawn; `names` take the place of those of classes."""
    return draw_boxes(
        image,
        torch.tensor([box.xyxy for box in boxes]).reshape(-1, 4),
        [classes.label_of[box.category_id] for box in boxes],
        [box.name for box in boxes] if names is None else names,
        [box.score for box in boxes],
    )


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Return the images' names relative to the deepest folder that holds them all, with slashes."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    root = os.path.commonpath(folders)
    return [Path(os.path.relpath(os.path.abspath(path), root)).as_posix() for path in paths]


def drawn_names(names: Sequence[str]) -> list[str]:
    """Return how the drawn copies are called: PNG and JPEG as the image is, PNG for all others.

    A name that is taken, in whatever case, gets a number.
    """
    taken: set[str] = set()
    drawn = []
    for name in map(Path, names):
        suffix = name.suffix if name.suffix.lower() in _KEPT_SUFFIXES else ".png"
        candidate, number = name.with_suffix(suffix).as_posix(), 1
        while candidate.casefold() in taken:
            number += 1
            candidate = name.with_name(f"{name.stem}_{number}{suffix}").as_posix()
        taken.add(candidate.casefold())
        drawn.append(candidate)
    return drawn


def crop_folders(names: Sequence[str]) -> dict[str, str]:
    """Return a folder's name for each class: its letters and digits, no two alike in any case."""
    folders: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = "".join(c if c.isalnum() or c in " -_" else "_" for c in name)
        plain = plain.encode()[:_LONGEST_FOLDER].decode(errors="ignore").strip() or "_"
        candidate, number = plain, 1
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{plain}_{number}"
        taken.add(candidate.casefold())
        folders[name] = candidate
    return folders
