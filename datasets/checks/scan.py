"""Decode every image, in parallel processes: what is in the files, whatever entries say of them."""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from PIL import UnidentifiedImageError
from tqdm import tqdm

from datasets.images import READ_ERRORS, TURNED, decode, open_image, orientation_of
from util.errors import DataError

_FEW = 64  # images that one process has decoded before others have started
_CHUNK = 8


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file holds. `size` is (height, width) as stored, None without a readable header.

    `state` is missing, unreadable (does not open), truncated (opens, does not decode) or sound, as
    far as it was read; `digest` is a hash of the bytes, `orientation` the EXIF tag (1: as stored),
    and `error` says what is wrong.
    """

    state: str = "missing"
    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes = b""
    error: str = ""

    @property
    def possible_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes that an entry may state: as stored, and after the EXIF orientation."""
        if self.size is None:
            return ()
        return (self.size, self.size[::-1] if self.orientation in TURNED else self.size)


def examine_file(path: Path) -> FileFacts:
    """Read and decode an image file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return FileFacts()
    except (OSError, ValueError) as error:
        return FileFacts("unreadable", error=_line(error))
    digest = hashlib.sha256(data).digest()
    size, orientation = None, 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; only pixels matter here
            with open_image(io.BytesIO(data)) as image:
                size = (image.height, image.width)
                decode(image)
                orientation = orientation_of(image)
    except READ_ERRORS as error:
        state = "truncated" if size else "unreadable"
        return FileFacts(state, size, orientation, digest, _line(error))
    return FileFacts("sound", size, orientation, digest)


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def scan(paths: Iterable[Path], *, processes: int) -> dict[Path, FileFacts]:
    """Return what each file holds, each decoded once; a bar shows the progress.

    Raises:
        DataError: a process was killed.
    """
    files = list(dict.fromkeys(paths))
    if processes < 2 or len(files) <= _FEW:
        return _collect(files, map(examine_file, files))
    # A forked process need not import everything again.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    try:
        with ProcessPoolExecutor(processes, context, _follow_main_process) as pool:
            return _collect(files, pool.map(examine_file, files, chunksize=_CHUNK))
    except BrokenProcessPool as error:
        raise DataError(
            "a decoding process was killed, probably out of memory. Lower `num_workers`."
        ) from error


def _follow_main_process() -> None:
    """Leave Ctrl-C to the main process, and exit when it exits, for whatever reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_main_process, daemon=True).start()


def _exit_with_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _collect(files: Sequence[Path], found: Iterable[FileFacts]) -> dict[Path, FileFacts]:
    bar = tqdm(found, total=len(files), desc="decoding", unit=" images", mininterval=0.5)
    return dict(zip(files, bar, strict=True))
