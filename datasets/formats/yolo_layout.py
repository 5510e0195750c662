"""Where the files of a YOLO data set are: what describes it, its images and their labels."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from datasets.formats.layout import (
    SPLITS,
    choose_split,
    files,
    files_below,
    folded,
    folders,
    split_names,
    subfolder,
)
from datasets.formats.registry import read_list
from datasets.formats.text import decode
from datasets.images import is_image, is_image_name, unread_kinds
from util.errors import DataError, brief
from util.yaml_files import read_yaml

_NAMES = ("classes.txt", "obj.names", "_darknet.labels", "classes.names", "labels.txt")
_MOST_BYTES = 4_000_000  # of all YAML files together that may be a data.yaml


@dataclass(frozen=True)
class Description:
    """What describes a set: the file, its options as in data.yaml, and the folder of its paths."""

    file: Path
    options: Mapping[str, Any]
    root: Path


def describe(place: Path) -> Description:
    """Read data.yaml, darknet's obj.data, or a list of classes; `place` is it or its folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if not os.path.isdir(place):
        return _read_data(place) if place.suffix.lower() == ".data" else _read_yaml(place)
    there = sorted([*place.glob("*.yaml"), *place.glob("*.yml")])
    usual = [path for path in there if path.stem == "data"]
    if usual or len(there) == 1:
        return _read_yaml([*usual, *there][0])
    if there:
        names = ", ".join(path.name for path in there)
        raise DataError(f"{place}: which file describes the data, {names}? Set `data_path` to it.")
    darknet = sorted(files(place, ".data")) or sorted(files(place / "data", ".data"))
    if len(darknet) == 1:
        return _read_data(darknet[0])
    names_file = names_of_classes(place)
    if names_file:
        return Description(names_file, {"names": read_list(names_file)}, _one_slash(place))
    raise DataError(
        f"{place}: there is no data.yaml, nor obj.data or classes.txt. Check `data_path`."
    )


def names_of_classes(place: Path) -> Path | None:
    """Return the list of classes of a set without data.yaml."""
    own = (subfolder(place, *split_names(split)) for split in SPLITS)
    for folder in (place, subfolder(place, "labels"), place / "data", *own):
        for name in _NAMES if folder else ():
            if folder and os.path.isfile(folder / name):
                return folder / name
    return None


def has_yolo(place: Path) -> str:
    """Return what shows that a folder holds YOLO data, "" if nothing does."""
    looked_at = 0  # bytes
    for file in sorted([*place.glob("*.yaml"), *place.glob("*.yml")]):
        try:
            size = file.stat().st_size
            if looked_at + size > _MOST_BYTES:
                continue
            looked_at += size
            options = _read_yaml(file).options
        except (OSError, DataError):
            continue
        if "names" in options and any(options.get(n) for s in SPLITS for n in split_names(s)):
            return file.name
    for above in (place, place / "data"):
        found = next(files(above, ".data"), None)
        if found:
            return found.relative_to(place).as_posix()
    names = names_of_classes(place)
    return names.relative_to(place).as_posix() if names and _has_labels(place) else ""


def _has_labels(place: Path) -> bool:
    """Return whether there are text files where labels can be."""
    names = {name.lower() for split in SPLITS for name in split_names(split)}
    for folder in (place, *(f for f in folders(place) if f.name.lower() in names)):
        labels = subfolder(folder, "labels")
        inner = (labels, *folders(labels)) if labels else (folder,)
        if any(path.name not in _NAMES for place in inner for path in files(place, ".txt")):
            return True
    return False


def _read_yaml(file: Path) -> Description:
    try:
        content = read_yaml(file, decode)
    except OSError as error:
        raise DataError(
            f"{file}: not a YOLO folder or its data.yaml ({error.strerror}). Check `data_path`."
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{file}:{line}: not YAML: {error.problem}. Fix the file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold `names`, `train` and `val`, not {brief(content)}.")
    here = _one_slash(Path(os.path.abspath(file.parent)))
    root = _one_slash(here / str(content.get("path") or ""))
    return Description(file, content, root if os.path.isdir(root) else here)  # of another machine


def _read_data(file: Path) -> Description:
    """Read darknet's obj.data: lines of key = value, with the list of classes under `names`."""
    pairs = (line.partition("=") for line in read_list(file))
    options: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
    root = _one_slash(Path(os.path.abspath(file.parent)))
    found = resolve(root, str(options.get("names") or "obj.names"))
    if found is None or not os.path.isfile(found):
        raise DataError(
            f"{file}: `names` must be the list of classes, not {options.get('names')!r:.200}, "
            f"which is not under {root}. Fix the path."
        )
    return Description(file, {**options, "names": read_list(found)}, root)


def _one_slash(path: Path) -> Path:
    """Return a path that starts with one slash where it has two, which POSIX tells apart."""
    text = str(path)
    return Path(text[1:]) if os.name == "posix" and text.startswith("//") else path


def _normal(path: Path) -> Path:
    """Return a path without `..` and doubled slashes, so that equal places are written alike."""
    return _one_slash(Path(os.path.normpath(path)))


def resolve(base: Path, entry: str) -> Path | None:
    """Return the file or folder that a path leads to, of this machine or of another.

    It is tried as it is, in the spelling of this system, and without its first parts: exports for
    other layouts and from other machines keep their end.
    """
    if os.path.exists(base / entry):
        return _normal(base / entry)
    plain = PurePath(entry.replace("\\", "/"))
    parts = [part for part in plain.parts if part not in (plain.anchor, ".")]
    if ".." in parts:
        parts = parts[len(parts) - parts[::-1].index("..") :]
    tries = [plain, *(PurePath(*parts[i:]) for i in range(len(parts)))]
    found = (_normal(base / path) for path in tries)
    return next((path for path in found if os.path.exists(path)), None)


def find_images(described: Description, split: str) -> tuple[list[Path], str]:
    """Return the images of a split, and how they were found if not by its name.

    Raises:
        DataError: the split names no images.
    """
    options, file, base = described.options, described.file, described.root
    name = next((name for name in split_names(split) if options.get(name)), split)
    entries: object = options.get(name)
    note = f"`{split}` is `{name}` there" if name != split else ""
    if not any(options.get(n) for s in SPLITS for n in split_names(s)):
        entries, note = _usual_entries(described, split)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries) or not entries:
        known = ", ".join(k for s in SPLITS for k in split_names(s) if options.get(k)) or "none"
        raise DataError(
            f"{file}: `{split}` must name a folder or a list of images, not {entries!r:.80}. "
            f"Splits there: {known}. {choose_split(split)}"
        )
    found: dict[Path, None] = {}
    unread = ""
    for entry in entries:
        path = resolve(base, entry)
        if path is None:
            raise DataError(
                f"{file}: `{split}` names '{entry:.200}', which is not under {base}. Fix the path."
            )
        if path != _normal(base / entry.replace("\\", "/")):
            where = f"'{entry:.200}' is read from {os.path.relpath(path, base)}"
            note = f"{note}; {where}" if note else where
        if os.path.isdir(path):
            there = sorted(files_below(path))
            found.update(dict.fromkeys(file for file in there if is_image(file)))
            unread = unread or unread_kinds(there)
            continue
        listed, dropped = _listed(path, base)
        found.update(dict.fromkeys(listed))
        if dropped:
            where = f"names in {path.name} are read without their first {dropped} parts"
            note = f"{note}; {where}" if note else where
    if not found:
        others = f", but files of kinds that are not read: {unread}" if unread else ""
        raise DataError(f"{file}: there are no images under `{split}` ({entries[0]:.200}){others}.")
    return list(found), note


def _usual_entries(described: Description, split: str) -> tuple[list[str], str]:
    """Return where a split's images are in a set that names no splits, and a note."""
    root = described.root
    images = subfolder(root, "images", "obj_train_data")
    own = {name: _of_split(root, images, name) for name in SPLITS}
    chosen = own.get(split) or _of_split(root, images, split)
    if chosen:
        is_list = os.path.isfile(chosen)
        return [str(chosen.absolute())], f"`{split}` is listed in {chosen.name}" if is_list else ""
    known = [name for name, place in own.items() if place]
    if known:
        raise DataError(
            f"{root}: there are no images of the split '{split}'. Splits there: "
            f"{', '.join(known)}. {choose_split(split)}"
        )
    note = f"no splits: every split is all images of {(images or root).name}/, train as val"
    return [str((images or root).absolute())], note


def _of_split(root: Path, images: Path | None, split: str) -> Path | None:
    """Return the folder of a split's images, or a list of them, as darknet's tools write it."""
    own = subfolder(root, *split_names(split))
    inner = own and subfolder(own, "images")
    below = images and subfolder(images, *split_names(split))
    lists = (root / f"{name}.txt" for name in split_names(split))
    return inner or below or own or next(filter(_lists_images, lists), None)


def _lists_images(path: Path) -> bool:
    """Return whether a file is a list of images, not the labels of one that is called so."""
    with contextlib.suppress(DataError):
        return os.path.isfile(path) and any(map(is_image_name, read_list(path)[:1]))
    return False


def _listed(path: Path, base: Path) -> tuple[list[Path], int]:
    """Return the images of a text file; ./ is the file's folder, else names are under `base`.

    Also returns how many first parts the names are read without, so that the first leads to a file.
    """
    names = [line.replace("\\", "/") for line in read_list(path)]
    bases = [path.parent if name.startswith("./") else base for name in names]
    found = [_normal(f / name) for f, name in zip(bases, names, strict=True)]
    if not found or os.path.exists(found[0]):  # false, not an error, for a name that is too long
        return found, 0
    first = resolve(base, names[0])
    if first is None:
        return found, 0
    dropped = len(PurePath(names[0]).parts) - len(first.relative_to(base).parts)
    return [base.joinpath(*PurePath(name).parts[dropped:]) for name in names], dropped


class LabelFiles:
    """Finds the label file of an image.

    The folder is `labels` for an `images` of the path, the last first, or that of the images, or a
    `labels` in it: the first that has a label file of one of the images. If none has, it is the
    first there can be. `spelled` has, by folder of images and stem of an image, the names of label
    files in another spelling, which only one image can mean.
    """

    def __init__(self, images: Iterable[Path]) -> None:
        stems: dict[Path, set[str]] = defaultdict(set)
        for image in images:
            stems[image.parent].add(image.stem)
        self.stems = stems
        self.folders = {folder: self._choose(folder, own) for folder, own in stems.items()}
        self.spelled = {f: _other_spellings(self.folders[f], f, own) for f, own in stems.items()}

    def __call__(self, image: Path) -> Path:
        """Return where the labels of an image are, if it has any."""
        name = self.spelled[image.parent].get(image.stem, f"{image.stem}.txt")
        return self.folders[image.parent] / name

    @staticmethod
    def _choose(folder: Path, stems: set[str]) -> Path:
        candidates, forms = list(_label_folders(folder)), set(map(folded, stems))
        for place in candidates:
            if any(folded(path.stem) in forms for path in files(place, ".txt")):
                return place
        return candidates[0]


def _other_spellings(folder: Path, images: Path, stems: Set[str]) -> dict[str, str]:
    """Return the label files of images whose stems they have in another spelling, by these stems.

    That is another case, as of names from Windows, or another form of accents, as from a Mac. The
    folder of images may have those of other splits, which keep theirs.
    """
    try:
        there = set(os.listdir(folder))
    except (OSError, ValueError):  # no such folder
        return {}
    lost = [stem for stem in stems if f"{stem}.txt" not in there]
    if not lost:
        return {}
    every = stems | _image_stems(images)
    free: dict[str, list[str]] = defaultdict(list)
    for name in there:
        if name[-4:].lower() == ".txt" and not (name.endswith(".txt") and name[:-4] in every):
            free[folded(name[:-4])].append(name)
    wanted = Counter(folded(stem) for stem in every if f"{stem}.txt" not in there)
    found = {stem: free.get(folded(stem), []) for stem in lost if wanted[folded(stem)] == 1}
    return {stem: names[0] for stem, names in found.items() if len(names) == 1}


def _image_stems(folder: Path) -> set[str]:
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):  # no such folder
        return set()
    return {os.path.splitext(name)[0] for name in names if is_image_name(name)}


def _label_folders(folder: Path) -> Iterator[Path]:
    parts = folder.parts
    for i in reversed(range(1, len(parts))):
        if parts[i].lower() == "images":
            above = Path(*parts[:i])
            yield (subfolder(above, "labels") or above / "labels").joinpath(*parts[i + 1 :])
    yield folder
    yield folder / "labels"
