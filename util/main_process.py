"""Work that the main process does for all others of a run."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from util.errors import UserError
from util.world import World

T = TypeVar("T")
_LONGEST_WORK = datetime.timedelta(hours=12)  # of the main process, while the others wait


def from_main(world: World, make: Callable[[], T]) -> T:
    """Return everywhere what `make` returns in the main process, the only one that calls it.

    Raises:
        UserError: `make` raised it; every process raises the same.
    """
    if world.size == 1:
        return make()
    patient: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WORK)
    made: list[Any] = [None]
    if world.main:
        try:
            made = [make()]
        except UserError as error:
            made = [error]
    dist.broadcast_object_list(made, group=patient)
    if isinstance(made[0], UserError):
        raise made[0]
    return cast(T, made[0])
