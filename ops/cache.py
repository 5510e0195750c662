"""The cache of compiled kernels: one process builds each while the others wait."""

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from .call import BackendError

SOURCES = Path(__file__).parent / "csrc"


def cache_dir() -> Path:
    """Return the folder of built kernels: `MSDEFORM_CACHE`, or one in the user's cache folder.

    Code is loaded from it. If others can write there, or nobody, a folder of our own among the
    temporary files takes its place.

    Raises:
        BackendError: there is no folder that we and nobody else can write.
    """
    chosen = os.environ.get("MSDEFORM_CACHE", "")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _usable(
        Path(os.path.expanduser(chosen) if chosen else os.path.join(base, "msdeform")),
        chosen=bool(chosen),
    )


@functools.cache  # so that what is wrong with a folder is said once
def _usable(folder: Path, *, chosen: bool) -> Path:
    try:
        if not folder.is_absolute() and not chosen:
            raise OSError("this user has no home folder")  # `~` stays as it is then
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            why = _exposed(folder)
    except OSError as error:
        if chosen or not hasattr(os, "getuid"):  # no owner to check on Windows
            raise BackendError(
                f"{folder} is not writable: {error}. Set MSDEFORM_CACHE to another folder."
            ) from error
        why = ""
    else:
        if not why:
            return folder
    own = Path(tempfile.gettempdir()) / f"msdeform-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        exposed = "it is a link" if own.is_symlink() else _exposed(own)
    except OSError as error:
        exposed = f"it cannot be made ({error.strerror})"
    if exposed:
        raise BackendError(
            f"{own} cannot hold kernels: {exposed}. Set MSDEFORM_CACHE to a folder of your own."
        )
    if why:
        text = f"ms_deform_attn: {folder} is not used for kernels: {why}. They are kept in {own}."
        print(text, file=sys.stderr, flush=True)
    return own


def _exposed(path: Path) -> str:
    """Return why another user could change what is there; "" if none could, apart from root."""
    if not hasattr(os, "getuid"):
        return ""
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        return f"it belongs to another user (id {status.st_uid})"
    return "other users can write it" if status.st_mode & 0o022 else ""


def key_of(*parts: str) -> str:
    """Return a hash of every source file and of `parts`."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def built(name: str, what: str, make: Callable[[Path], None]) -> Path:
    """Return the cached file `name`, after `make(path)` if it is not there as it was made.

    Several processes may call this at once: one makes the file, the others wait for it. A hash of
    its content is kept beside it: what a full disk or a power cut has damaged is built again.

    Raises:
        BackendError: raised by `make`, with the compiler's full output. It is saved to a file; the
            error names the file and has one line of it.
    """
    target = cache_dir() / name
    if _sound(target):
        return target
    with contextlib.ExitStack() as stack:
        # where a file system has no locks, two processes may both build; the replacement is atomic
        with contextlib.suppress(OSError, NotImplementedError):
            stack.enter_context(FileLock(target.with_suffix(".lock")))
        if _sound(target):
            return target
        print(f"ms_deform_attn: building {what}, once", end=" ", file=sys.stderr, flush=True)
        start = time.monotonic()
        part = target.with_name(f"{name}.{os.getpid()}.part")
        try:
            make(part)
            if not part.is_file():
                raise BackendError("it said nothing\nno error, but it has made no file")
            digest = hashlib.sha256(part.read_bytes()).hexdigest()
            _write(_sum_of(part), digest.encode())
            _write(part, None)
            os.replace(_sum_of(part), _sum_of(target))
            os.replace(part, target)
        except BackendError as error:
            print("failed", file=sys.stderr, flush=True)
            log = target.with_name(f"failed-{target.stem}.log")
            log.write_text(str(error))
            command, *lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = [line for line in lines if "error" in line.lower()] or lines[-1:] or [command]
            raise BackendError(
                f"building {what} failed: {_shortened(said[0])} (full output: {log})"
            ) from None
        finally:
            part.unlink(missing_ok=True)
            _sum_of(part).unlink(missing_ok=True)
        print(f"({time.monotonic() - start:.1f} s): {target}", file=sys.stderr, flush=True)
    return target


def _shortened(line: str) -> str:
    """Cut the middle: a line may begin with a long command and end with what became of it."""
    return line if len(line) <= 200 else f"{line[:100]} ... {line[-95:]}"


def _sum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sound(path: Path) -> bool:
    """Return whether a file is there as it was made, and nobody else can have made it."""
    try:
        if (
            _exposed(path)
            or _exposed(_sum_of(path))
            or not (path.is_file() and path.stat().st_size)
        ):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == _sum_of(path).read_text("ascii")
    except (OSError, ValueError):
        return False


def _write(path: Path, content: bytes | None) -> None:
    """Bring a file to the disk, with new content if there is any."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if content is not None:
            os.write(handle, content)
        if hasattr(os, "fchmod"):
            os.fchmod(handle, 0o755)  # whatever the mask of the process says
        os.fsync(handle)
    finally:
        os.close(handle)
