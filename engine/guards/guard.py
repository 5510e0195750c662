"""What a guard is: something that watches the steps of a run from outside the step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.batch import Batch
from util.errors import UserError


@dataclass(frozen=True)
class LoggedStep:
    """A step as it is logged: values on the host, means over all processes.

    `values` have the official names; `image_ids` are this process's; `rates` the learning rates
    of the step.
    """

    step: int
    epoch: int
    image_ids: Sequence[int]
    values: Mapping[str, float]
    rates: Mapping[str, float]

    @property
    def finite(self) -> bool:
        """Return whether the step changed the weights."""
        return math.isfinite(self.values["loss"] + self.values["grad_norm"])


class Guard:
    """Does nothing; a guard overrides what it needs.

    `name` is the key of its state in a checkpoint; a guard without one has no state.
    """

    name = ""

    def before_step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """See the micro-batches of this process before the step."""

    def after_step(
        self, step: int, micro_batches: Sequence[Batch], metrics: Mapping[str, Tensor]
    ) -> None:
        """See the step's losses and gradient norm, on the device, right after the step."""

    def on_error(
        self, error: RuntimeError | MemoryError, micro_batches: Sequence[Batch]
    ) -> UserError | None:
        """Return what the user can do about an error of the step, None where that is unknown."""

    def on_log(self, step: LoggedStep) -> None:
        """See a step when it is logged, some steps later."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
