"""The cache of compiled kernels: one process builds each while the others wait."""

import contextlib
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
    """Return the folder of built kernels: `MSDEFORM_CACHE`, or one in the user's cache folder."""
    if chosen := os.environ.get("MSDEFORM_CACHE"):
        folder = Path(chosen).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "msdeform"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if chosen or not hasattr(os, "getuid"):  # no owner to check on Windows
            raise BackendError(
                f"{folder} is not writable: {error}. Set MSDEFORM_CACHE to another folder."
            ) from error
    folder = Path(tempfile.gettempdir()) / f"msdeform-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        # code is loaded from here: it must not be another user's folder
        raise BackendError(f"{folder} belongs to another user. Set MSDEFORM_CACHE.")
    return folder


def key_of(*parts: str) -> str:
    """Return a hash of every source file and of `parts`."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def built(name: str, what: str, make: Callable[[Path], None]) -> Path:
    """Return the cached file `name`, after `make(path)` if it does not exist yet.

    Several processes may call this at once: one makes the file, the others wait for it.

    Raises:
        BackendError: raised by `make`, with the compiler's full output. It is saved to a file; the
            error names the file and has one line of it.
    """
    target = cache_dir() / name
    if target.exists():
        return target
    with contextlib.ExitStack() as stack:
        # where a file system has no locks, two processes may both build; the replacement is atomic
        with contextlib.suppress(OSError, NotImplementedError):
            stack.enter_context(FileLock(target.with_suffix(".lock")))
        if target.exists():
            return target
        print(f"ms_deform_attn: building {what}, once", end=" ", file=sys.stderr, flush=True)
        start = time.monotonic()
        part = target.with_name(f"{name}.{os.getpid()}.part")
        try:
            make(part)
            os.replace(part, target)
        except BackendError as error:
            print("failed", file=sys.stderr, flush=True)
            log = target.with_name(f"failed-{target.stem}.log")
            log.write_text(str(error))
            command, *lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = [line for line in lines if "error" in line.lower()] or lines[-1:] or [command]
            raise BackendError(
                f"building {what} failed: {said[0][:200]} (full output: {log})"
            ) from None
        finally:
            part.unlink(missing_ok=True)
        print(f"({time.monotonic() - start:.1f} s): {target}", file=sys.stderr, flush=True)
    return target
