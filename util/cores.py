"""How much of the machine a process may use."""

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
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        cores = int(quota) // int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return max(1, cores) if int(quota) > 0 else None  # -1: none
