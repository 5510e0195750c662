"""How much of the machine a process may use."""

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_cores(cgroup: Path = _CGROUP) -> int:
    """Count the cores that this process may use, at least 1.

    A batch system binds a process to some cores; a container gets a share of their time, which
    only its control group shows (at `cgroup`, version 1 or 2).
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux knows which cores it may use
        cores = os.cpu_count() or 1
    return max(1, min(cores, _allotted(cgroup) or cores))


def _allotted(cgroup: Path) -> int | None:
    """Return how many cores' time the control group has, None where there is no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        # "max" is no number; where neither version has files, there is no control group
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            return max(1, int(quota) // int(period)) if int(quota) > 0 else None  # -1: none
    return None
