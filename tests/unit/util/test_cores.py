"""The cores a process may use: those it is bound to, and no more than its container has time of."""

import os
from pathlib import Path

import pytest

from util.cores import available_cores

BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, BOUND),
        ({"cpu.max": "max 100000\n"}, BOUND),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "250000 100000\n"}, min(BOUND, 2)),
        ({"cpu.max": "99900000 100000\n"}, BOUND),
        ({"cpu.max": "nonsense\n"}, BOUND),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, BOUND),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n"}, BOUND),
    ],
)
def test_cores_are_those_of_the_container(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == expected
