"""How effective batches are split between processes and micro-batches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSplit:
    """Which part of every effective batch a process takes, and in how many micro-batches.

    An effective batch holds `batch_size * accumulation * world_size` images.
    """

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def effective(self) -> int:
        """Return the images of a step on all processes."""
        return self.batch_size * self.accumulation * self.world_size
