"""Check images: which files are there, how large they are, and what decoding them shows."""

import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from datasets.arrays import IntArray
from datasets.checks.findings import FileFacts, SplitReport
from datasets.checks.names import find_files
from datasets.images import (
    LARGEST_IMAGE,
    READ_ERRORS,
    decode,
    limit_pixels,
    open_image,
    orientation_of,
    read_header,
    small_grey,
)
from util.console import in_line, log
from util.errors import DataError
from util.files import head_of, no_text, read_regular
from util.progress import progress

_SIZES_CHECKED = 100  # images whose stated size is compared with the file when an index is made
_FEW = 64  # images that one process has decoded before others have started
# A forked process need not import everything again; elsewhere, system libraries may not survive it.
_START: str | None = "fork" if sys.platform == "linux" else None


def check_headers(report: SplitReport, *, every_size: bool = False) -> None:
    """Check which images are there, and read the headers of those that state no size and of some.

    If one of these states another size than its file, if none can be read, or with `every_size`,
    all headers are read, and every wrong size is put right. If those that are read are right, wrong
    ones among the others go unnoticed.

    Raises:
        DataError: none of the images is there, or none can be read.
    """
    first, total = report.images.file_names[0], len(report.images.ids)
    missing = find_files(report)
    images = report.images
    if len(missing) == len(images.ids):
        hint = missing[0].error if missing else ""
        raise DataError(
            f"{in_line(str(report.source.image_dir / first)):.400}: no such image, nor any other "
            f"of the {total} in the annotation file"
            f"{hint and f'; {in_line(hint):.200}'}. Check the image folder."
        )
    present = np.setdiff1d(np.arange(len(images.ids)), list(missing))
    states_size = np.asarray(images.sizes[present].all(axis=1))
    stated = present[states_size]
    facts = missing | _read_headers(report, present[~states_size])
    step = 1 if every_size else max(1, len(stated) // _SIZES_CHECKED)
    compared = _read_headers(report, stated[::step])
    wrong = sum(found.contradicts(*images.sizes[i].tolist()) for i, found in compared.items())
    unread = all(found.state == "unreadable" for found in compared.values())
    if (wrong or unread) and step > 1:
        what = "cannot be read" if unread else "are of another size than stated"
        log.info(
            f"{in_line(str(report.source.place))}: {wrong or len(compared)} of {len(compared)} "
            f"images looked at {what}: reading the headers of all {len(stated)}"
        )
        compared = _read_headers(report, stated)
    facts |= compared
    if len(facts) == total and all(facts[i].state == "unreadable" for i in present.tolist()):
        path = report.path(int(present[0]))
        count = len(present)
        others = f" Nor can any other of the {count} images be read." if count > 1 else ""
        raise DataError(f"{in_line(str(path)):.250}: {_reason(path)}.{others}")
    check_files(report, facts, compared=len(compared))


def _read_headers(report: SplitReport, rows: IntArray) -> dict[int, FileFacts]:
    headers = {i: read_header(report.path(i)) for i in rows.tolist()}
    return {
        i: FileFacts("unreadable", error=no_text(head_of(report.path(i))))
        if header is None
        else FileFacts("sound", *header)
        for i, header in headers.items()
    }


def _reason(path: Path) -> str:
    """Return why the header of an image cannot be read."""
    what = no_text(head_of(path))
    try:
        with open_image(path):
            return what
    except READ_ERRORS as error:
        return what or f"cannot be read: {_line(error)}"


def check_files(report: SplitReport, facts: Mapping[int, FileFacts], *, compared: int = 0) -> None:
    """Report images that are not there or damaged, and sizes that are not those of the files.

    `facts` are what is known of files, by position of the image; the sizes that count, those of the
    files where the two differ, are put into the images. `compared` is the number of files that
    stated sizes were compared with, if not all.
    """
    stated, sizes = report.images.sizes, report.images.sizes.copy()
    found: dict[str, list[int]] = defaultdict(list)
    for i, of_file in sorted(facts.items()):
        if of_file.state != "sound":
            found[f"{of_file.state}_image"].append(i)
        if of_file.size is not None and of_file.contradicts(*stated[i].tolist()):
            found["wrong_size" if stated[i].all() else "size_not_stated"].append(i)
            sizes[i] = of_file.size
    report.facts.update(facts)
    report.report_images("missing_image", found["missing_image"], lambda i: facts[i].error)
    opened = 0 if len(facts) == len(stated) else len(facts) - len(found["missing_image"])
    for kind in ("unreadable_image", "truncated_image"):
        report.report_images(kind, found[kind], lambda i: facts[i].error, checked=opened)

    def difference(i: int) -> str:
        (height, width), size = stated[i], facts[i].size or (0, 0)
        return f"stated {width} x {height}, is {size[1]} x {size[0]}"

    report.report_images("size_not_stated", found["size_not_stated"])
    report.report_images("wrong_size", found["wrong_size"], difference, checked=compared)
    report.images = replace(report.images, sizes=sizes)


def examine_file(path: Path, *, small: bool = False) -> FileFacts:
    """Read and decode an image file; `small` makes a small version of it, too."""
    try:
        data = read_regular(path, LARGEST_IMAGE)
    except FileNotFoundError:
        return FileFacts()
    except (OSError, ValueError) as error:
        return FileFacts("unreadable", error=_line(error))
    digest = hashlib.sha256(data).digest()
    size, orientation = None, 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid metadata; only pixels matter here
            with open_image(io.BytesIO(data)) as image:
                size = (image.height, image.width)
                decode(image)
                orientation = orientation_of(image)
                shrunk = small_grey(image, orientation) if small else b""
    except READ_ERRORS as error:
        what = no_text(data)
        return FileFacts(
            "truncated" if size else "unreadable", size, orientation, digest, what or _line(error)
        )
    return FileFacts("sound", size, orientation, digest, small=shrunk)


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def scan(paths: Iterable[Path], *, processes: int, small: bool = False) -> dict[Path, FileFacts]:
    """Return what each file holds, each decoded once; a bar shows the progress.

    `small` is for `examine_file`.

    Raises:
        DataError: a process was killed.
    """
    files = list(dict.fromkeys(paths))
    examine = partial(examine_file, small=small)
    if processes < 2 or len(files) <= _FEW:
        return _collect(files, map(examine, files))
    context, limit = multiprocessing.get_context(_START), Image.MAX_IMAGE_PIXELS
    try:
        with ProcessPoolExecutor(processes, context, _follow_main_process, (limit,)) as pool:
            return _collect(files, pool.map(examine, files, chunksize=8))
    except BrokenProcessPool as error:
        raise DataError(
            "a decoding process was killed, probably out of memory. Lower `num_workers`."
        ) from error


def _follow_main_process(max_pixels: int | None) -> None:
    """Leave Ctrl-C to the main process, and exit when it exits, for whatever reason.

    A process that was not forked has its own limit of an image's pixels, set here to the main
    process's.
    """
    limit_pixels(max_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_main_process, daemon=True).start()


def _exit_with_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _collect(files: Sequence[Path], found: Iterable[FileFacts]) -> dict[Path, FileFacts]:
    with_bar = progress(found, total=len(files), description="decoding", unit="image")
    return dict(zip(files, with_bar, strict=True))
