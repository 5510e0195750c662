"""What a data format is, and the formats by name.

A format reads a split as a COCO-format file would hold it, and writes splits. Add one: a file that
registers it, and the file's line in `FORMATS`.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Any, Literal

from datasets.formats.stamps import Stamp
from datasets.formats.text import decode
from util.errors import DataError
from util.files import open_regular, read_regular
from util.registry import Registry

LARGEST_LIST = 2**30  # bytes of a list or of the labels of an image
DIGITS = 6  # of a pixel that are read; hides the rounding of numbers written in decimal


@dataclass(frozen=True)
class Reading:
    """What flags of annotations mean; see the options of the same names."""

    crowd: Literal["keep", "as_objects"] = "keep"
    ignore_key: Literal["crowd", "drop", "keep"] = "crowd"


USUAL = Reading()


@dataclass(frozen=True)
class Source:
    """A split of a data set, not checked: flaws of its entries stay as they are.

    `content` is what a COCO-format file holds, its file names relative to `image_dir`; `place` is
    the file or folder to name in messages. `findings` are what could not be read at all, by kind of
    flaw: the file (and line), and what is wrong there. `folders` are those to look through, not
    what is below, for images that no split names; without any, `image_dir` with all below.
    """

    content: dict[str, Any]
    image_dir: Path
    place: Path
    findings: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    reading: Reading = USUAL
    folders: tuple[Path, ...] = ()


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
    folder if the splits do not fit the format. Both also take the `options` by name. `stamp` takes
    the same place and split, and a `Stamp`, to which it adds all that decides what `read` returns:
    without it, what was read of a large set is not kept for the next time.
    """

    read: Callable[..., Source]
    write: Callable[..., list[list[str]]]
    options: tuple[str, ...] = ()
    stamp: Callable[[Path, str, Stamp], None] | None = None


FORMATS: Registry[Format] = Registry(
    "data_format",
    __package__,
    {"coco": ".coco", "labelme": ".labelme", "voc": ".voc", "yolo": ".yolo"},
)


def read_source(data_format: str, place: Path, split: str, **options: str) -> Source:
    """Read a split of a data set; `place` is its folder, or what else the format takes.

    Raises:
        ConfigError: there is no such format.
        DataError: what describes the set is missing or cannot be read.
    """
    return FORMATS[data_format].read(place, split, **options)


@dataclass
class Placer:
    """Links or copies images; no two get the same name without suffix in a folder."""

    copy: bool
    _taken: set[Path] = field(default_factory=set)

    def free(self, name: str, folder: Path, split: str) -> str:
        """Return `name`, changed if another image of the folder has it."""
        path = PurePath(name)
        own = f"{split}_{path.stem}"
        stems = chain([path.stem, own], (f"{own}_{number}" for number in count(2)))
        stem = next(stem for stem in stems if folder / path.with_name(stem) not in self._taken)
        self._taken.add(folder / path.with_name(stem))
        return path.with_name(stem + path.suffix).as_posix()

    def put(self, image: SplitImage, target: Path) -> None:
        """Make the image appear at `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.copy:
            with contextlib.suppress(OSError):  # a file system or an account without links
                os.symlink(image.file.resolve(), target)
        if not os.path.lexists(target):  # as for a second entry of one file
            with open_regular(image.file) as source, target.open("xb") as copied:
                shutil.copyfileobj(source, copied)


def write_text(path: Path, text: str) -> None:
    """Write one of very many files: flushing each to the disk would take minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def as_text(value: float) -> str:
    """Return a number without a fraction it does not have."""
    return str(int(value)) if value == int(value) else repr(value)


def read_list(path: Path) -> list[str]:
    """Return the lines of a list of names that are not empty.

    Raises:
        DataError: it cannot be read, or is not text in UTF-8.
    """
    try:
        lines = decode(read_regular(path, LARGEST_LIST)).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a list: {error}.") from error
    return [line.strip() for line in lines if line.strip()]
