"""The processes of a run: who we are among them, and small exchanges between their hosts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of a run. A single process gets back what it puts in.

    Exchanges go through the hosts' memory, so that none waits for a GPU; gradients go their own
    way. Every process must call each of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine
    group: Any = None  # gloo's

    @property
    def main(self) -> bool:
        """Return whether this process writes the logs and files."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up each number over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return list(total.tolist())

    def every(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every process, by rank."""
        if self.size == 1:
            return [list(values)]
        rows = [torch.zeros(len(values), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(rows, torch.tensor(values, dtype=torch.float64), group=self.group)
        return [list(row.tolist()) for row in rows]

    def gather(self, item: T) -> list[T]:
        """Return everybody's item by rank in the main process, and nothing in the others."""
        if self.size == 1:
            return [item]
        items: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(item, items, group=self.group)
        return items or []

    def broadcast(self, item: T) -> T:
        """Return the main process's item everywhere."""
        if self.size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, group=self.group)
        return items[0]
