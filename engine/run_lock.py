"""One run at a time in an output folder."""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from util.console import console
from util.distributed import World
from util.errors import ConfigError
from util.files import make_output_dir

if sys.platform != "win32":
    import fcntl

_NAME = ".lock"
_PATIENCE = 5.0  # seconds that the processes of a killed run may take to be gone
_FAR_PATIENCE = 100.0  # NFSv4 servers keep the locks of a host that died for some 90 s
_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def run_lock(folder: Path, world: World) -> Iterator[None]:
    """Make a run's folder, and keep the runs of other processes out of it.

    The main process holds it. The system lets go of it when that process ends, however it does,
    so a killed run leaves nothing behind that blocks. Where the system has no such locks (Windows,
    some network drives) nothing is held. On a network drive a dead host may hold it for a while, so
    that what another host holds is waited for longer.

    Raises:
        ConfigError: another run goes on in the folder, or it cannot be made.
    """
    file, other = _hold(folder) if world.main else (None, "")
    try:
        other = world.broadcast(other)
        if other:
            raise ConfigError(
                f"--output_dir {folder}: expected a folder that no other run writes to, but "
                f"{other} does. Wait for its end, or choose another folder."
            )
        yield
    finally:
        if file is not None:
            file.truncate(0)
            file.close()


def _hold(folder: Path) -> tuple[TextIO | None, str]:
    """Return the open file that holds the folder, or the name of the process that does."""
    make_output_dir(folder)
    if sys.platform == "win32":
        return None, ""
    file = (folder / _NAME).open("a+", encoding="utf-8")
    begun, told = time.monotonic(), False
    while True:
        try:
            # not flock: loader processes, which outlive a killed run a little, would hold it too
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                file.close()
                return None, ""
            file.seek(0)
            other = file.read().strip() or "another process"
            far = " on " in other and not other.endswith(f" on {socket.gethostname()}")
            if time.monotonic() > begun + (_FAR_PATIENCE if far else _PATIENCE):
                file.close()
                return None, other
            if far and not told:
                told = True
                console(
                    f"--output_dir {folder}: waiting up to {_FAR_PATIENCE:.0f} s for {other} to "
                    "end, or for its lock to run out if that host is dead"
                )
                sys.stdout.flush()
            time.sleep(0.2)
            continue
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # other hosts read it
        return file, ""
