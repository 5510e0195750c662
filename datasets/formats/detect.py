"""Find out what format a folder of data has."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from datasets.formats.coco_layouts import has_coco
from datasets.formats.labelme import has_labelme
from datasets.formats.layout import files, folders
from datasets.formats.others import NAMES, other_format
from datasets.formats.registry import FORMATS, Source, read_source
from datasets.formats.stamps import Stamp
from datasets.formats.voc import has_voc
from datasets.formats.yolo_layout import has_yolo
from datasets.formats.yolo_lines import read_lines
from util.errors import DataError
from util.files import head_of, no_text

AUTO = "auto"
_SIGNS: dict[str, Callable[[Path], str]] = {
    "coco": has_coco, "voc": has_voc, "yolo": has_yolo, "labelme": has_labelme,
}  # fmt: skip
_YOLO_FILES = (".yaml", ".yml", ".data")
_DEPTH = 3  # folders that hold nothing but one folder, as archives leave them
_WIDTH = 20  # folders that are looked into
_SUFFIXES = (*NAMES, ".json", ".xml", ".txt")
_EXAMINED, _FEW = 50, 3  # folders that are looked through for such files, and files of each kind


@dataclass(frozen=True)
class Located:
    """Where data is and in which format; `sign` says how that was found out, if it was."""

    data_format: str
    place: Path
    sign: str = ""

    def read(self, split: str, **options: str) -> Source:
        """Read a split; see `read_source`."""
        source = read_source(self.data_format, self.place, split, **options)
        return replace(source, findings={**self.told(split, source.image_dir), **source.findings})

    def stamp(self, split: str, *values: object) -> Stamp | None:
        """Return a stamp of what `read` returns, with other values; None if the format has none.

        Raises:
            DataError: see `read_source`.
        """
        add = FORMATS[self.data_format].stamp
        if add is None:
            return None
        stamp = Stamp(self.data_format, str(self.place.absolute()), self.sign, split, *values)
        add(self.place, split, stamp)
        return stamp

    def told(self, split: str, image_dir: Path) -> dict[str, list[tuple[str, str]]]:
        """Return the finding that says what was found out, nothing if the format was given."""
        where = os.path.relpath(image_dir, self.place)
        detail = f"{self.data_format}, by {self.sign}; images of {split} in {where}"
        return {"detected_format": [(self.place.name, detail)]} if self.sign else {}


def locate(place: Path, data_format: str) -> Located:
    """Return a data set's format, which "auto" finds out, and its folder.

    Raises:
        ConfigError: there is no such format.
        DataError: the folder holds no data of a known format, or of several.
    """
    if data_format != AUTO:
        assert FORMATS[data_format]
        return Located(data_format, place)
    if not os.path.isdir(place):
        return Located(_format_of_file(place), place)
    found, folder = {}, place
    for _ in range(_DEPTH):
        found = _recognise(folder)
        inner = {} if found else {f: s for f in folders(folder)[:_WIDTH] if (s := _recognise(f))}
        if len(inner) > 1:
            names = ", ".join(f"{f.name} ({', '.join(s)})" for f, s in list(inner.items())[:5])
            raise DataError(
                f"{folder}: there are several data sets: {names}. Set `data_path` to one of them."
            )
        if found or inner:
            folder, found = next(iter(inner.items()), (folder, found))
            break
        if len(folders(folder)) != 1:
            break
        folder = folders(folder)[0]
    if len(found) == 1:
        name, sign = next(iter(found.items()))
        below = "" if folder == place else f"{folder.relative_to(place).as_posix()}/: "
        return Located(name, folder, below + sign)
    if found:
        signs = ", ".join(f"{name} ({sign})" for name, sign in found.items())
        raise DataError(
            f"{folder}: it holds data of several formats: {signs}. Choose with `data_format`."
        )
    raise DataError(f"{place}: {_unknown(place)}")


def _recognise(folder: Path) -> dict[str, str]:
    """Return the formats that a folder seems to have, and what shows it."""
    return {name: sign for name, seems in _SIGNS.items() if (sign := seems(folder))}


def _format_of_file(place: Path) -> str:
    if place.suffix.lower() in _YOLO_FILES:
        return "yolo"
    if not os.path.exists(place):
        raise DataError(f"{place}: no such folder of data. Check `data_path`.")
    if place.suffix.lower() == ".json":
        raise DataError(
            f"{place}: a file. If it is in COCO's format, set `train_annotations` (or "
            "`val_annotations`) to it and `train_images` to the folder of its images."
        )
    what = no_text(head_of(place))
    if what:
        raise DataError(f"{place}: {what}. Then set `data_path` to the folder of the data.")
    raise DataError(f"{place}: not a folder of data. Set `data_path` to one.")


def _unknown(place: Path) -> str:
    """Return that a folder has no data, and what other format it may have."""
    for file in _some_files(place):
        name, other = file.relative_to(place).as_posix(), other_format(file)
        if other:
            return (
                f"{name} looks like {other}, which is not read. "
                "Export the data as COCO, VOC or YOLO."
            )
        if file.suffix.lower() == ".txt" and read_lines(file)[0]:
            return (
                f"{name} looks like a label file of YOLO, but nothing names the classes. List "
                "their names in classes.txt there, one a line, or write a data.yaml."
            )
    return (
        "no data of a known format: neither a COCO-format file, nor VOC's XML files, nor YOLO's "
        "data.yaml or classes.txt, nor labelme's files. Check `data_path`, or set `data_format`."
    )


def _some_files(place: Path) -> Iterator[Path]:
    """Yield some of the files that may hold annotations, those of the upper folders first."""
    queue = deque([(place, 0)])
    for _ in range(_EXAMINED):
        if not queue:
            return
        folder, depth = queue.popleft()
        for suffix in _SUFFIXES:
            yield from sorted(islice(files(folder, suffix), _FEW))
        queue.extend((below, depth + 1) for below in folders(folder) if depth < _DEPTH)
