"""Check images: which files are there, and how large they are."""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datasets.arrays import Images
from datasets.checks.scan import FileFacts
from datasets.checks.split_report import SplitReport, printable
from datasets.images import read_header
from util.errors import DataError

_SIZES_CHECKED = 100  # images whose stated size is compared with the file when an index is made
_DAMAGED = ("missing_image", "unreadable_image", "truncated_image")


def check_headers(report: SplitReport) -> None:
    """Check which images are there, and read the headers of those that state no size and of some.

    Raises:
        DataError: none of the images is there.
    """
    images = report.images
    missing = find_missing(report)
    if len(missing) == len(images.ids):
        first = printable(str(report.path(0)))
        hint = (
            "Write / instead of \\." if "\\" in images.file_names[0] else "Check the image folder."
        )
        raise DataError(
            f"{first:.400}: no such image, nor any other of the {len(images.ids)} in the "
            f"annotation file. {hint}"
        )
    present = np.setdiff1d(np.arange(len(images.ids)), missing)
    stated = np.asarray(images.sizes[present].all(axis=1))
    some = present[stated][:: max(1, int(stated.sum()) // _SIZES_CHECKED)]
    facts = {i: FileFacts() for i in missing}
    for i in [*present[~stated].tolist(), *some.tolist()]:
        header = read_header(report.path(i))
        facts[i] = FileFacts("unreadable") if header is None else FileFacts("sound", *header)
    check_files(report, facts, compared=len(some))


def check_files(report: SplitReport, facts: Mapping[int, FileFacts], *, compared: int = 0) -> None:
    """Report images that are not there or damaged, and sizes that are not those of the files.

    `facts` are what is known of files, by position of the image; the sizes that count, those of the
    files where the two differ, are put into the images. `compared` is the number of files that
    stated sizes were compared with, if not all.
    """
    stated, sizes = report.images.sizes.tolist(), report.images.sizes.copy()
    found: dict[str, list[int]] = defaultdict(list)
    for i in sorted(facts):
        of_file = facts[i]
        if of_file.state != "sound":
            found[f"{of_file.state}_image"].append(i)
        if of_file.size is not None and tuple(stated[i]) not in of_file.possible_sizes:
            found["wrong_size" if all(stated[i]) else "size_not_stated"].append(i)
            sizes[i] = of_file.size
    report.facts.update(facts)
    opened = 0 if len(facts) == len(stated) else len(facts) - len(found["missing_image"])
    for kind in _DAMAGED:
        checked = 0 if kind == "missing_image" else opened
        report.report_images(kind, found[kind], lambda i: facts[i].error, checked=checked)

    def difference(i: int) -> str:
        (height, width), size = stated[i], facts[i].size or (0, 0)
        return f"stated {width} x {height}, is {size[1]} x {size[0]}"

    report.report_images("size_not_stated", found["size_not_stated"])
    report.report_images("wrong_size", found["wrong_size"], difference, checked=compared)
    report.images = Images(report.images.ids, report.images.file_names, sizes)


def find_missing(report: SplitReport) -> list[int]:
    """Return the positions of images without a file, listing each folder once."""
    by_folder: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for i, file_name in enumerate(report.images.file_names):
        folder, name = os.path.split(file_name)
        by_folder[folder].append((i, name))
    missing = []
    for folder, images in by_folder.items():
        there = _files(report.source.image_dir / folder)
        missing += [i for i, name in images if name not in there]
    return sorted(missing)


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
