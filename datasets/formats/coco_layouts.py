"""Where tools put a split's COCO-format file, and its images."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datasets.formats.layout import (
    SPLITS,
    choose_split,
    files,
    first_values,
    folders,
    mentions,
    split_names,
    subfolder,
)
from util.errors import DataError

_ALONE = ("annotations", "_annotations", "instances", "labels", "coco", "result")
_OF_SPLIT = ("instances_{}2017", "instances_{}", "{}", "{}_annotations", "annotations_{}",
             "{}_coco")  # fmt: skip
_IMAGES = ("images", "data", "JPEGImages")
_KEYS = ("images", "annotations", "categories")


def coco_layout(root: Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split in COCO's own layout."""
    return root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"


def find_coco(root: Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split, in any usual layout.

    COCO's own comes first. The folder of images is the first that has those that the file names.

    Raises:
        DataError: there are COCO-format files, but none is of this split.
    """
    official = coco_layout(root, split)
    if os.path.isfile(official[0]):
        return official
    found = _annotation_file(root, split)
    if found:
        return found[1], _image_folder(root, *found)
    if any(os.path.isfile(coco_layout(root, other)[0]) for other in SPLITS):
        return official  # which is then named as missing
    known = [name for name in SPLITS if _annotation_file(root, name)]
    if known:
        raise DataError(
            f"{root}: there is no COCO-format file of the split '{split}'. Splits there: "
            f"{', '.join(known)}. {choose_split(split)}"
        )
    files_there = sorted(islice(_coco_files(root), 20))
    others = [path.relative_to(root).as_posix() for path in files_there]
    if len(others) == 1:
        images = _image_folder(root, split, files_there[0])
        raise DataError(
            f"{root}: there is one COCO-format file, {others[0]}, and nothing says of which split. "
            f"For {split}, give `{split}_annotations {files_there[0]}` `{split}_images {images}`, "
            "and a file of other images for the other split."
        )
    if others:
        raise DataError(
            f"{root}: no COCO-format file is of the split '{split}'. There are: "
            f"{', '.join(others[:5])}. Set `{split}_annotations` and `{split}_images`, or choose "
            "with `train_split` and `val_split`."
        )
    return official


def has_coco(root: Path) -> str:
    """Return the name of a COCO-format file of a folder's splits, "" if there is none."""
    for split in SPLITS:
        official, _ = coco_layout(root, split)
        if os.path.isfile(official):
            return official.relative_to(root).as_posix()
    found = (_annotation_file(root, split) for split in SPLITS)
    file = next((place[1] for place in found if place), None) or next(_coco_files(root), None)
    return file.relative_to(root).as_posix() if file else ""


def _annotation_file(root: Path, split: str) -> tuple[str, Path] | None:
    """Return what a split is called here, and its file."""
    for name in split_names(split):
        for file in _candidates(root, name):
            if os.path.isfile(file) and mentions(file, *_KEYS):
                return name, file
    return None


def _candidates(root: Path, name: str) -> Iterator[Path]:
    own = subfolder(root, name)
    if own:
        yield own / "_annotations.coco.json"
    for folder in (subfolder(root, "annotations", "labels"), root):
        if folder:
            yield from (folder / f"{stem.format(name)}.json" for stem in _OF_SPLIT)
            several = sorted(folder.glob(f"instances_{name}*.json"))
            yield from several if len(several) == 1 else ()
    for place in (own, own and subfolder(own, "annotations")):
        if place:
            alone = sorted(files(place, ".json"))[:2]
            yield from (place / f"{stem}.json" for stem in (*_ALONE, f"instances_{name}"))
            yield from alone if len(alone) == 1 else ()


def _coco_files(root: Path) -> Iterator[Path]:
    """Yield the COCO-format files of a folder and of its annotations/."""
    for folder in (subfolder(root, "annotations"), root):
        for path in sorted(islice(files(folder, ".json"), 100)) if folder else ():
            if mentions(path, *_KEYS):
                yield path


def _image_folder(root: Path, name: str, file: Path) -> Path:
    """Return the first folder that has one of the file's first images, else the first there is."""
    places = [root / f"{name}2017"]
    for above in (subfolder(root, name), root):
        inner = above and subfolder(above, *_IMAGES)
        if inner:
            places += [inner / name, inner / f"{name}2017", inner]
        places += [above] if above and above != root else []
    places += [file.parent, root]
    places += [f for inner in folders(root) if (f := subfolder(inner, *_IMAGES))]
    places = [place for place in places if os.path.isdir(place)]
    names = [text.replace("\\", "/") for text in first_values(file, "file_name", 3)]
    for wanted in (names, [name.rpartition("/")[2] for name in names]):
        for place in places:
            if any(_is_file(place, name) for name in wanted if name):
                return place
    return places[0]


def _is_file(folder: Path, name: str) -> bool:
    try:
        return os.path.isfile(folder / name)
    except (OSError, ValueError):  # a name that no file can have
        return False
