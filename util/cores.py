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
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        # "max" is no number; where neither version has files, there is no control group
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            share = int(quota) // int(period)
            return max(1, min(cores, share)) if int(quota) > 0 else cores  # -1: no limit
    return cores
