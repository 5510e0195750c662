"""One run at a time in an output folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from util.console import log
from util.errors import ConfigError
from util.files import make_output_dir
from util.world import World

_LOCK, _HOLDER = ".lock", ".lock_holder"
_PATIENCE = 15.0  # seconds that the processes of a killed run may take to end
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from some network drives
_FAR_PATIENCE = 100.0  # NFSv4 servers keep the locks of a host that died for some 90 s


@contextlib.contextmanager
def run_lock(folder: Path, world: World) -> Iterator[None]:
    """Make a run's folder, and keep other runs out of it.

    The main process holds the lock. The system releases it when that process ends, however it
    ends, so a killed run blocks nothing. On a network drive the lock of a dead host may stay for a
    while, so the lock of another host is waited for longer. A drive without locks protects nothing.

    Raises:
        ConfigError: another run uses the folder, or it cannot be made.
    """
    lock, other = _acquire(folder) if world.main else (None, "")
    try:
        other = world.broadcast(other)
        if other:
            raise ConfigError(
                f"output_dir {folder}: {other} is training there. Wait for its end, or choose "
                "another folder."
            )
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # a folder that has become unwritable
                (folder / _HOLDER).unlink()
            lock.release()


def _acquire(folder: Path) -> tuple[FileLock | None, str]:
    """Return the lock of the folder, and the name of the process that holds it instead of us."""
    make_output_dir(folder)
    lock, holder, other = FileLock(folder / _LOCK), folder / _HOLDER, "another process"
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with contextlib.suppress(OSError):
                other = holder.read_text(encoding="utf-8").strip() or other
            far = " on " in other and not other.endswith(f" on {socket.gethostname()}")
            patience = _FAR_PATIENCE if far else _PATIENCE
            expiry = ", or for its lock to expire if that host is dead" if far else ""
            log.info(
                f"output_dir {folder}: waiting up to {patience:.0f} s for {other} to end{expiry}"
            )
            lock.acquire(timeout=patience, poll_interval=0.2)
    except Timeout:
        return None, other
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None, ""
    with holder.open("w", encoding="utf-8") as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # other hosts read it
    return lock, ""
