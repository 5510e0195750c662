"""Output folders, and files that a crash leaves with their old content or the new, never half."""

import codecs
import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

from util.errors import ConfigError

HEAD = 400  # bytes that show what a file is
# What people get in the place of a file, by its first bytes.
_PAGE = "is a web page. Download it again: the link led to a page, not to the file"
_STAND_INS = {
    b"version https://git-lfs": "is a Git LFS pointer. Run `git lfs pull` to fetch the file",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}
_PACKED = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "ZIP", b"\xfd7zXZ\0": "xz",
    b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!\x1a\x07": "RAR",
    # of each level; the first three letters begin texts, too
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
}  # fmt: skip


def stand_in(head: bytes) -> str:
    """Return what a file is that only stands for another, and what to do; "" for any other.

    `head` has its first bytes, `HEAD` of them or more.
    """
    start = head[:HEAD].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((what for begin, what in _STAND_INS.items() if start.startswith(begin)), "")


def no_text(head: bytes) -> str:
    """Return why a file is neither text nor an image, and what to do, where that shows.

    See `stand_in`.
    """
    packed = next((name for begin, name in _PACKED.items() if head.startswith(begin)), "")
    return f"is packed ({packed}). Unpack it" if packed else stand_in(head)


def make_output_dir(path: Path, option: str = "output_dir") -> None:
    """Make the folder of results, if it is not there; an error begins with `option`.

    Raises:
        ConfigError: a file is in the way, or the place is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: the folder cannot be made ({error.strerror}). Choose another."
        ) from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path}: the folder is not writable. Choose another.")


def refuse_overwriting(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raise ConfigError if an output is an input file, under whatever name or link."""
    identity = attrgetter("st_dev", "st_ino")
    files = {identity(path.stat()) for path in inputs if path.is_file()}
    for output in outputs:
        if output.exists() and identity(output.stat()) in files:
            raise ConfigError(
                f"output_dir: '{output}' is one of the inputs and would be overwritten. Choose "
                "another folder."
            )


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return names of different paths that differ: the last parts, with as many as that takes."""
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    names = ["/".join(part[-1:]) for part in parts]
    for count in range(2, max(map(len, parts), default=1) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(part[-count:]) for part in parts]
    return names


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a file to read it; what a link leads to must be a regular file, too.

    Others may never end, as a device, or wait forever for a writer, as a named pipe. `limit` is the
    most bytes that it may have.

    Raises:
        OSError: it is none, is too large, or cannot be opened.
    """
    # without O_NONBLOCK, opening a pipe alone would wait
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        if limit is not None and status.st_size > limit:
            what = f"{status.st_size:,} bytes are more than the {limit:,} that are read"
            raise OSError(errno.EFBIG, what, str(path))
        return open(path, "rb", opener=lambda *_: handle)  # it knows its name
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most `limit`; see `open_regular`."""
    with open_regular(path, limit) as file:
        return file.read()  # with a number, room for so many bytes would be made first


def head_of(path: Path) -> bytes:
    """Return the first bytes of a regular file, none where it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(HEAD)
    except (OSError, ValueError):  # a name that no file can have
        return b""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a file name beside `path`, whose file replaces `path` when the block succeeds.

    The folder is made if needed. After an error, or a crash at any moment, `path` is as before;
    what has been written and renamed survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if os.name == "posix":  # folders cannot be opened elsewhere
            _sync(path.parent, os.O_RDONLY)
    finally:
        with contextlib.suppress(OSError):  # gone after a success; unreachable without its folder
            temporary.unlink()


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str, *, errors: str = "strict") -> None:
    """Replace the content of `path` in one step, making its folder if needed.

    `errors`: what becomes of characters that UTF-8 lacks, as in `str.encode`; for JSON and HTML
    "backslashreplace" loses nothing.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)
