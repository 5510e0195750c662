"""A warning for a run whose loss stays where it started."""

import math
from collections.abc import Mapping
from typing import Any

from engine.guards.guard import Guard, LoggedStep
from util.console import log

_BLOCKS = 5  # of a window: its first and its last fifth are compared
_TOLERANCE = 0.1  # of a loss that is near its start


class FlatLoss(Guard):
    """Warns once when a run does not learn.

    A window is flat when its last fifth has not fallen below its first by more than two standard
    errors of their difference, or 1 %. It is worth a warning only while the loss is within a tenth
    of the first fifth of the first window: a run that has learnt and converged is flat, too.
    """

    def __init__(
        self,
        *,
        effective_batch: int,
        lr: float,
        window: int = 500,
        first_step: int = 0,
        quiet: bool = False,
    ) -> None:
        """Watch windows of `window` steps from `first_step` on.

        `effective_batch` and `lr` are named in the warning, which a `quiet` process keeps to
        itself.
        """
        if window < 2 * _BLOCKS:
            raise ValueError(f"window: {window} steps are too few, use at least {2 * _BLOCKS}")
        self.effective_batch = effective_batch
        self.lr = lr
        self.first_step = first_step
        self.quiet = quiet
        self._size = window // _BLOCKS
        self._start: float | None = None
        self._warned = False
        self._blocks: list[list[float]] = []  # first step, mean, squared standard error
        self._block: list[float] = [0.0, 0.0, 0.0, 0.0]  # first step, count, mean, deviations

    def on_log(self, step: LoggedStep) -> None:
        if step.finite and step.step >= self.first_step:
            warning = self.add(step.step, step.values["loss"])
            if warning and not self.quiet:
                log.warning(warning)

    def add(self, step: int, loss: float) -> str | None:
        """Take in a step's loss; return a warning when a flat window has just ended.

        Losses that are not finite are skipped. After a warning the next one comes only when
        the loss has fallen well below its start and risen again.
        """
        if not math.isfinite(loss):
            return None
        first, count, mean, deviations = self._block
        first, count = (first if count else float(step)), count + 1
        delta = loss - mean
        mean += delta / count
        deviations += delta * (loss - mean)
        self._block = [first, count, mean, deviations]
        if count < self._size:
            return None
        self._block = [0.0, 0.0, 0.0, 0.0]
        self._blocks = [
            *self._blocks[1 - _BLOCKS :],
            [first, mean, deviations / (count - 1) / count],
        ]
        self._start = mean if self._start is None else self._start
        # the first and the last block of a whole window
        (first, before, error_before), (_, now, error_now) = self._blocks[0], self._blocks[-1]
        level = now / self._start if self._start else 0.0
        if level < 1 - 2 * _TOLERANCE:  # farther than noise leads
            self._warned = False
        needed = max(2 * math.sqrt(error_before + error_now), 0.01 * before)
        flat = len(self._blocks) == _BLOCKS and before - now <= needed
        if self._warned or not flat or level < 1 - _TOLERANCE:
            return None
        self._warned = True
        return (
            f"the loss has not fallen from step {int(first)} to {step}: it was "
            f"{before:.4g} and is {now:.4g}, with an effective batch of {self.effective_batch} and "
            f"`lr {self.lr:g}`. Look at the boxes in pictures/: do they fit their objects? Then "
            "try `effective_batch_size 32`, a lower `lr`, or `warmup_steps 1000`; "
            "`python main.py doctor` checks the attention kernel."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "start": self._start,
            "warned": self._warned,
            "blocks": [list(block) for block in self._blocks],
            "block": list(self._block),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._start = state["start"]
        self._warned = state["warned"]
        self._blocks = [list(block) for block in state["blocks"]]
        self._block = list(state["block"])
