"""What watches the steps of a run from outside: memory, numbers, the loss, images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from engine.guards.flat_loss import FlatLoss
from engine.guards.guard import MemoryGuard, UnreadableImages
from engine.guards.nonfinite import NonFiniteSteps
from util.batch import Batch

__all__ = ["FlatLoss", "Guards", "MemoryGuard", "NonFiniteSteps", "UnreadableImages"]


class Guards(NamedTuple):
    """The guards of a run; see `Guard` for what each of them can do."""

    unreadable: UnreadableImages
    memory: MemoryGuard
    nonfinite: NonFiniteSteps
    flat_loss: FlatLoss

    @contextmanager
    def watch(self, step: int, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Run a step inside: guards see its batches, and turn its errors into advice."""
        for guard in self:
            guard.before_step(step, micro_batches)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            for guard in self:
                if advice := guard.on_error(error, micro_batches):
                    raise advice from error
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the guards' states as plain values, for a checkpoint."""
        return {"nonfinite": self.nonfinite.state_dict(), "watchdog": self.flat_loss.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.nonfinite.load_state_dict(state["nonfinite"])
        self.flat_loss.load_state_dict(state["watchdog"])
