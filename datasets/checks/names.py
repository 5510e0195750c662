"""Find the files of images whose names are written as other programs or systems write them."""

import contextlib
import difflib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from datasets.arrays import BoolArray, IntArray, Names
from datasets.checks.findings import FileFacts, Findings, SplitReport
from datasets.formats.layout import folded, is_hidden, listings, nfc

_LISTED = 1_000_000  # files of a folder that are looked through
_COMPARED = 1_000  # names that a missing one is compared with
_HINTS = 5  # missing images that get the closest name
_LONGEST = 255  # characters of a name that is compared
_PERHAPS_OUTSIDE = re.compile(r"\.\.|[\\:\0]")  # what may lead out of a folder on some system
_END = "end of the path"
_ADDRESS = "end of its address"


def find_files(report: SplitReport) -> dict[int, FileFacts]:
    """Put the names of files into the images; return those without a file, by position.

    A name that no file has is matched in ways that come closer and closer to a guess, each only if
    exactly one file of the folder fits that no other image has. Images whose names lead out of the
    folder and fit nothing in it are left out, with their boxes.
    """
    names = list(report.images.file_names)
    addresses = report.images.addresses
    report.images = replace(report.images, addresses=Names.of(()))
    lost = _without_file(report, names)
    if not lost:
        return {}
    folder = report.source.image_dir
    files = _list_files(folder)
    matched = _match(names, lost, folder, files, addresses)
    _report_matches(report, names, matched)
    outside = [i for i in lost if i not in matched and not is_inside(names[i])]
    for i, (file, _) in matched.items():
        names[i] = file
    report.images = replace(report.images, file_names=Names.of(names))
    kept = np.ones(len(names), dtype=np.bool_)
    kept[outside] = False
    _leave_out(report, kept)
    position = np.cumsum(kept) - 1
    missing = [i for i in lost if i not in matched and kept[i]]
    hints = _closest(names, missing, files)
    return {int(position[i]): FileFacts("missing", error=hints.get(i, "")) for i in missing}


def is_inside(file_name: str) -> bool:
    """Return whether a name, joined to a folder, stays in it."""
    if file_name[:1] != "/" and not _PERHAPS_OUTSIDE.search(file_name):
        return True  # a path object for each name of a large set would take a second
    path = PurePath(file_name)
    return not (path.anchor or ".." in path.parts or "\0" in file_name)


def _without_file(report: SplitReport, names: Sequence[str]) -> list[int]:
    """Return the positions of names that no file has, listing each folder once."""
    folder = report.source.image_dir
    inside = [is_inside(name) for name in names]
    paths = [os.path.split(name) for name in names]
    there = {
        part: _files(folder / part)
        for part in {part for (part, _), ok in zip(paths, inside, strict=True) if ok}
    }
    return [
        i
        for i, ((part, name), ok) in enumerate(zip(paths, inside, strict=True))
        if not ok or name not in there[part]
    ]


def _files(folder: Path) -> set[str]:
    """Return the names of the files in a folder; a link counts if it leads to one.

    The listing says what each entry is without asking for it, which takes minutes on some networks.
    """
    try:
        with os.scandir(folder) as entries:
            return {
                entry.name
                for entry in entries
                if entry.is_file(follow_symlinks=False)
                or (entry.is_symlink() and os.path.isfile(entry.path))
            }
    except (OSError, ValueError):  # no folder, or none that could have this name
        return set()


def _list_files(folder: Path) -> list[str]:
    """Return the files below a folder, relative to it; none of a whole disk or what is as large."""
    found: list[str] = []
    if folder.resolve() == Path(folder.resolve().anchor):
        return found
    for place, names in listings(folder, follow_links=True):
        relative = place.relative_to(folder)
        found += ((relative / name).as_posix() for name in names if not is_hidden(name))
        if len(found) > _LISTED:
            return []
    return sorted(found)


class _Matches:
    """What was found so far: the file of a name and the way it was found, by position."""

    def __init__(self, names: Sequence[str], lost: Sequence[int], folder: Path, files: set[str]):
        self.names, self.files = names, files
        self.forms = {i: list(_forms(names[i], folder)) for i in lost}
        self.found: dict[int, tuple[str, str]] = {}
        self._taken = {name for i, name in enumerate(names) if i not in self.forms}

    @property
    def lost(self) -> list[int]:
        """Positions of names without a file."""
        return [i for i in self.forms if i not in self.found]

    def accept(self, found: Mapping[int, tuple[str | None, str]]) -> None:
        """Take files that no other image has, nor needs."""
        wanted = Counter(file for file, _ in {(f, self.names[i]) for i, (f, _) in found.items()})
        for i, (file, way) in found.items():
            if file is not None and file not in self._taken and wanted[file] == 1:
                self.found[i] = file, way
        self._taken.update(file for file, _ in self.found.values())


def _match(
    names: Sequence[str],
    lost: Sequence[int],
    folder: Path,
    files: Sequence[str],
    addresses: Names,
) -> dict[int, tuple[str, str]]:
    """Return the file and the way it was found, by position."""
    matches = _Matches(names, lost, folder, set(files))
    exact = {}
    for i, forms in matches.forms.items():
        exact[i] = next(((form, way) for way, form in forms if form in matches.files), (None, ""))
    matches.accept(exact)
    for way, key, of_images in _LOOSE:
        table: dict[str, list[str]] = defaultdict(list)
        for file in files if matches.lost else ():
            if not of_images or _is_image(file):
                table[key(file)].append(file)
        keys = {i: [key(form) for _, form in matches.forms[i]] for i in matches.lost}
        matches.accept({i: (_only(table, own), way) for i, own in keys.items()})
    # Where some images of a folder were found, one that was not is really missing.
    gone = set(matches.lost)
    place = [os.path.dirname(name.replace("\\", "/")) for name in names]
    known = {part for i, part in enumerate(place) if i not in gone}
    rest = {i: matches.forms[i][-1][1] for i in gone if place[i] not in known}
    matches.accept({i: (_tail(form, matches.files), _END) for i, form in sorted(rest.items())})
    base_names = {file: PurePosixPath(file).name for file in files} if rest else {}
    for way, key in _BY_BASE_NAME:
        table = defaultdict(list)
        for file, base_name in base_names.items():
            if _is_image(file):
                table[key(base_name)].append(file)
        keys = {i: [key(PurePosixPath(rest[i]).name)] for i in matches.lost if i in rest}
        matches.accept({i: (_only(table, own), way) for i, own in keys.items()})
    if len(addresses) and matches.lost:
        by_base_name = defaultdict(list)
        for file in files:
            by_base_name[PurePosixPath(file).name].append(file)
        ends = {i: _of_address(addresses[i], matches, by_base_name) for i in matches.lost}
        matches.accept({i: (file, _ADDRESS) for i, file in ends.items()})
    return matches.found


def _of_address(
    addresses: str, matches: _Matches, by_base_name: Mapping[str, Sequence[str]]
) -> str | None:
    """Return the file that one of an image's addresses ends with, or has the base name of."""
    for address in addresses.splitlines():
        form = _unquoted(address, Path())
        found = _tail(form, matches.files) or _only(by_base_name, [PurePosixPath(form).name])
        if found:
            return found
    return None


def _forms(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield a name in its possible spellings, each built on the last, and what was changed."""
    ways: list[str] = []
    form = name
    for way, change in _SPELLINGS:
        changed = change(form, folder)
        ways += [way] if changed != form else []
        form = changed
        yield ", ".join(ways), form


def _relative(form: str, folder: Path) -> str:
    for root in (folder.absolute(), folder.resolve()):
        form = form.removeprefix(f"{root.as_posix()}/")
    return form


def _without_folder(form: str, folder: Path) -> str:
    """Return a path without what the folder's own path ends with."""
    parts, own = PurePosixPath(form).parts, folder.resolve().parts
    lengths = range(1, min(len(parts), len(own) + 1))
    return next(("/".join(parts[n:]) for n in lengths if parts[:n] == own[-n:]), form)


def _unquoted(form: str, folder: Path) -> str:
    """Return a path without percent signs; of an address, its path."""
    with contextlib.suppress(ValueError):
        form = urlsplit(form).path if "://" in form else form
    return unquote(form)


def _tail(form: str, files: set[str]) -> str | None:
    """Return the longest end of a path that is a file."""
    parts = PurePosixPath(form).parts
    ends = ("/".join(parts[start:]) for start in range(1, min(len(parts), 50)))
    return next((end for end in ends if end in files), None)


def _only(table: Mapping[str, Sequence[str]], keys: Iterable[str]) -> str | None:
    """Return the one file that any of several keys leads to, None where there are more."""
    files = {file for key in keys for file in table.get(key, ())}
    return files.pop() if len(files) == 1 else None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()


def _stem(name: str) -> str:
    """Return a name in one case without its suffix, if that is one of an image."""
    form = folded(name)
    return os.path.splitext(form)[0] if _is_image(form) else form


_SPELLINGS: Sequence[tuple[str, Callable[[str, Path], str]]] = (
    ("/ for \\", lambda form, folder: form.replace("\\", "/")),
    ("absolute path", _relative),
    ("without the folder's own name", _without_folder),
    ("unquoted", _unquoted),
)
_LOOSE: Sequence[tuple[str, Callable[[str], str], bool]] = (
    ("other form of accents", nfc, False),
    ("other case", folded, False),
    ("other suffix", _stem, True),
)
_BY_BASE_NAME: Sequence[tuple[str, Callable[[str], str]]] = (
    ("base name", str),
    ("base name, other case", folded),
    ("base name, other suffix", _stem),
)


def _report_matches(
    report: SplitReport, names: Sequence[str], matched: dict[int, tuple[str, str]]
) -> None:
    """Report how names were matched, a finding for each way."""
    for way in dict.fromkeys(way for _, way in matched.values()):
        rows = np.array([i for i in sorted(matched) if matched[i][1] == way])
        _report(report, "matched_name", rows, lambda i: "is {!r} ({})".format(*matched[i]))


def _report(report: SplitReport, kind: str, rows: IntArray, detail: Callable[[int], str]) -> None:
    """Report images by their rows in the file, which stay when images are left out."""
    file_rows = report.image_rows[rows]
    position = dict(zip(file_rows.tolist(), rows.tolist(), strict=True))
    names = report.images.file_names

    def describe(row: int) -> tuple[str, str]:
        return names[position[row]], detail(position[row])

    report.report(
        Findings(
            kind,
            file_rows,
            describe,
            "images",
            image_ids=report.images.ids[rows],
            out_of=f" of {len(names)}",
        )
    )


def _leave_out(report: SplitReport, kept: BoolArray) -> None:
    """Keep only some images, and the annotations of these."""
    if kept.all():
        return
    _report(report, "outside_folder", np.flatnonzero(~kept), lambda i: "")
    with_image = kept[report.annotations.image]
    gone = report.annotation_rows[~with_image]
    report.hidden.append(Findings("image_left_out", gone, section="annotations"))
    found = report.annotations.select(with_image)
    report.annotations = replace(found, image=(np.cumsum(kept) - 1)[found.image])
    report.annotation_rows = report.annotation_rows[with_image]
    report.images = report.images.select(kept)
    report.image_rows = report.image_rows[kept]


def _closest(names: Sequence[str], missing: Sequence[int], files: Sequence[str]) -> dict[int, str]:
    """Return the closest names of files for the first of the missing images."""
    pool = {PurePosixPath(file).name: file for file in files[:_COMPARED]}
    hints: dict[int, str] = {}
    for i in missing[:_HINTS]:
        name = PurePosixPath(names[i].replace("\\", "/")).name
        close = difflib.get_close_matches(name, pool, n=1) if len(name) <= _LONGEST else []
        hints |= {i: f"the closest is {pool[close[0]]!r}"} if close else {}
    return hints
