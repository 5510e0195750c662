"""How tools lay out folders: what they call splits, and files that are not data."""

import contextlib
import json
import mmap
import os
import re
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SPLITS = ("train", "val", "test")
# Folders of programs: copies that Jupyter keeps, small ones of a disk station, what a Mac adds.
_OF_PROGRAMS = (".", "__MACOSX", "__pycache__", "@eaDir")
_ALIASES = {
    "train": ("training",),
    "val": ("valid", "validation"),
    "test": ("testing",),
}


def split_names(split: str) -> tuple[str, ...]:
    """Return what folders, lists and keys of a split may be called, its own name first."""
    return (split, *_ALIASES.get(split, ()))


def choose_split(split: str) -> str:
    """Return a sentence on what helps where a split is not there."""
    text = "Choose with `train_split` and `val_split`"
    if split != "val":
        return f"{text}."
    return f"{text}, or leave val out: `no_validate` to train, `splits train` to check or convert."


def is_hidden(name: str) -> bool:
    """Return whether a file is of the system, such as a Mac's ._ files beside the real ones."""
    return name.startswith("._")


def folded(name: str) -> str:
    """Return a name in one case, with accents in one form."""
    return nfc(nfc(name).casefold())


def nfc(name: str) -> str:
    """Return a name with accents in the form in which most systems write them."""
    return unicodedata.normalize("NFC", name)


def subfolder(root: Path, *names: str) -> Path | None:
    """Return the first folder of these names in another, in any case if none is written so."""
    for name in names:
        if os.path.isdir(root / name):
            return root / name
    there = {path.name.lower(): path for path in folders(root)}
    return next((there[name.lower()] for name in names if name.lower() in there), None)


def folders(root: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none if it cannot be listed."""
    try:
        with os.scandir(root) as entries:
            return sorted(
                root / e.name
                for e in entries
                if not e.name.startswith(_OF_PROGRAMS) and os.path.isdir(e.path)
            )
    except (OSError, ValueError):  # a name that no folder can have
        return []


def files(root: Path, suffix: str) -> Iterator[Path]:
    """Yield the files of a suffix in a folder, in no order; none if it cannot be listed."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                name = entry.name
                fits = name.lower().endswith(suffix) and not is_hidden(name)
                if fits and os.path.isfile(entry.path):  # an entry fails for links in a circle
                    yield root / name
    except (OSError, ValueError):  # a name that no folder can have
        return


def has_file(root: Path | None, suffix: str) -> bool:
    """Return whether a folder holds a file of a suffix."""
    return root is not None and next(files(root, suffix), None) is not None


def walk(root: Path, suffix: str) -> list[Path]:
    """Return the files of a suffix, in any case, in a folder and all below, sorted."""
    found = (path for path in files_below(root) if path.name.lower().endswith(suffix))
    return sorted(path for path in found if not is_hidden(path.name))


def files_below(root: Path) -> Iterator[Path]:
    """Yield the files in a folder and all below, in no order; links to folders are not followed."""
    for folder, names in listings(root):
        yield from (folder / name for name in names)


def listings(root: Path, *, follow_links: bool = False) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and all below, each with the names of its files and of links to files.

    Hidden folders below it and those of programs are left out: what is in them are copies.
    A listing says what each entry is without asking for it, which takes minutes on some networks.
    Nothing recurses: an archive can nest folders a thousand deep. With `follow_links`, a folder to
    which several lead comes once.
    """
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        names: list[str] = []
        with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
            status = os.stat(folder)
            if follow_links and (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                linked = entry.is_symlink()
                if entry.is_dir(follow_symlinks=False) or (
                    follow_links and linked and os.path.isdir(entry.path)
                ):
                    if not entry.name.startswith(_OF_PROGRAMS):
                        waiting.append(folder / entry.name)
                elif entry.is_file(follow_symlinks=False) or (
                    linked and os.path.isfile(entry.path)
                ):
                    names.append(entry.name)
        yield folder, names


def mentions(path: Path, *words: str) -> bool:
    """Return whether a file holds all of these JSON keys, without reading it into memory."""
    return all(next(_find(path, rb'"%s"' % word.encode()), None) is not None for word in words)


def first_values(path: Path, key: str, count: int) -> list[str]:
    """Return the first texts that a JSON file has under a key."""
    pattern = rb'"%s"\s*:\s*("(?:[^"\\]|\\.){0,2000}")' % key.encode()
    found = _find(path, pattern)
    texts = []
    for match in islice(found, count):
        with contextlib.suppress(ValueError):
            texts.append(str(json.loads(match.group(1).decode("utf-8", "replace"))))
    return texts


def _find(path: Path, pattern: bytes) -> Iterator[re.Match[bytes]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from re.finditer(pattern, data)
    except (OSError, ValueError):  # not readable, or empty
        return
