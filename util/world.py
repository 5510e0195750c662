"""The processes of a run: who we are among them, and small exchanges between their hosts."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from util.errors import UserError

T = TypeVar("T")
_LONGEST_WORK = datetime.timedelta(hours=12)  # of the main process, while the others wait


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

    def from_main(self, make: Callable[[], T]) -> T:
        """Return everywhere what `make` returns in the main process, the only one that calls it.

        Raises:
            UserError: `make` raised it; every process raises the same.
        """
        if self.size == 1:
            return make()
        patient: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WORK)
        made: list[Any] = [None]
        if self.main:
            try:
                made = [make()]
            except UserError as error:
                made = [error]
        dist.broadcast_object_list(made, group=patient)
        if isinstance(made[0], UserError):
            raise made[0]
        return cast(T, made[0])
