"""Time and memory of calls on this machine."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls, in their order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Return what 95 % of the calls do not exceed, interpolated between calls."""
        return float(np.percentile(self.seconds, 95))

    def to_json(self) -> dict[str, float]:
        """Return median and 95th percentile in milliseconds."""
        return {"median_ms": 1000 * self.median, "p95_ms": 1000 * self.p95}


def time_in_turn(
    calls: Sequence[Callable[[], object]], *, runs: int, warm_up: int, device: torch.device
) -> list[Times]:
    """Time calls that take turns, so that what else the machine does meets all of them.

    The first `warm_up` rounds are not counted: they fill caches and choose kernels.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for round_ in range(warm_up + runs):
        for call, seconds in zip(calls, taken, strict=True):
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if round_ >= warm_up:
                seconds.append(time.perf_counter() - start)
    return [Times(tuple(seconds)) for seconds in taken]


def synchronise(device: torch.device) -> None:
    """Wait for all work under way on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_during(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes in use during a call; None where the system does not report it.

    On a GPU those of tensors on it, else those of the whole process, weights and libraries
    included (Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    try:
        _CLEAR.write_text(_RESET_PEAK)
        call()
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), None)
