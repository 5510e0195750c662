"""What a data format is: a way to read a split, as a COCO-format file holds it, and to write it."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from datasets.checks.findings import Finding


@dataclass(frozen=True)
class Source:
    """A split of a data set, not checked: flaws of its entries stay as they are.

    `content` is what a COCO-format file holds, its file names relative to `image_dir`; `place` is
    the file or folder to name in messages. `findings` are what could not be read at all, by kind.
    """

    content: dict[str, Any]
    image_dir: Path
    place: Path
    findings: Mapping[str, Sequence[Finding]] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitImage:
    """An image to write: `size` is (height, width), (0, 0) if it is unknown.

    Shape: labels [K]; xywh [K,4] pixels; area [K]; crowd [K].
    """

    id: int
    name: str
    file: Path
    size: tuple[int, int]
    labels: list[int]
    xywh: list[list[float]]
    area: list[float]
    crowd: list[bool]


@dataclass(frozen=True)
class Split:
    """A checked split to write; label i is the category `ids[i]`, called `class_names[i]`."""

    name: str
    ids: tuple[int, ...]
    class_names: tuple[str, ...]
    images: list[SplitImage]


@dataclass(frozen=True)
class Format:
    """A data format, as its file registers it.

    `read` takes the place of a data set and a split's name, and raises a DataError if what
    describes the set is missing or cannot be read. `write` takes splits, a new folder and a
    `Placer`; it returns a list of notices on each split, and raises a DataError before it makes the
    folder if the splits do not fit the format. Both also take the `options` by name.
    """

    read: Callable[..., Source]
    write: Callable[..., list[list[str]]]
    options: tuple[str, ...] = ()


class Placer:
    """Links or copies images; no two get the same name without suffix in a folder."""

    def __init__(self, *, copy: bool) -> None:
        self._copy = copy
        self._taken: set[Path] = set()

    def free(self, name: str, folder: Path, split: str) -> str:
        """Return `name`, changed if another image of the folder has it."""
        path = PurePath(name)
        stems = [path.stem, f"{split}_{path.stem}"]
        number = 2
        while folder / path.with_name(stems[0]) in self._taken:
            stems = [*stems[1:], f"{split}_{path.stem}_{number}"]
            number += 1
        self._taken.add(folder / path.with_name(stems[0]))
        return path.with_name(stems[0] + path.suffix).as_posix()

    def put(self, image: SplitImage, target: Path) -> None:
        """Make the image appear at `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):  # two entries of one file
            return
        if not self._copy:
            try:
                os.symlink(image.file.resolve(), target)
            except OSError:  # a file system or an account without links
                shutil.copyfile(image.file, target)
        else:
            shutil.copyfile(image.file, target)


def write_text(path: Path, text: str) -> None:
    """Write one of very many files: flushing each to the disk would take minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def as_text(value: float) -> str:
    """Return a number without a fraction it does not have."""
    return str(int(value)) if value == int(value) else repr(value)
