"""How long the parts of a training step take, measured where the work is done."""

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch


class StepTimer:
    """Times the parts of steps without making the host wait for the device.

    On CUDA, marks are events on the device's stream: a part lasts from when the device reaches
    one mark to when it reaches the next, so that waiting for the host counts, too. Elsewhere the
    host's clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        """Start the clock."""
        self._device = device
        self._finished: dict[int, list[tuple[str, Any]]] = {}
        self.restart()

    def restart(self) -> None:
        """Restart the clock, as after an evaluation; forget the present step."""
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """Count the time since the last mark as `part`; equal parts of a step add up."""
        self._marks.append((part, self._now()))

    def finish_step(self, step: int) -> None:
        """End the step of this number at its last mark, where the next one starts."""
        self._finished[step] = self._marks
        self._marks = [("", self._marks[-1][1])]

    def take(self, step: int) -> dict[str, float]:
        """Return the seconds of each part of a finished step, once.

        Empty as long as the device has not finished the step.
        """
        seconds: dict[str, float] = {}
        on_host = self._device.type != "cuda"
        if on_host or self._finished[step][-1][1].query():
            for (_, before), (part, after) in pairwise(self._finished.pop(step)):
                passed = after - before if on_host else before.elapsed_time(after) / 1000  # ms
                seconds[part] = seconds.get(part, 0.0) + passed
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def shares(totals: Mapping[str, float]) -> str:
    """Return "data 2 %, forward 31 %, ...": the share of each part in the seconds of all.

    Parts keep their order; the text is empty where no time has passed.
    """
    whole = sum(totals.values())
    shown = (f"{part} {100 * seconds / whole:.0f} %" for part, seconds in totals.items())
    return ", ".join(shown) if whole else ""
