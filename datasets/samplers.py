"""The order of images: how effective batches are split, and which images each holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch.utils.data import Sampler

from datasets.dataset import SampleKey, seeded_generator
from util.errors import ConfigError


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


def split_batch(effective: int, *, max_size: int, rank: int = 0, world_size: int = 1) -> BatchSplit:
    """Divide an effective batch among processes, and each part into micro-batches.

    A micro-batch has at most `max_size` images; an effective batch of 0 means one such in each
    process.

    Raises:
        ConfigError: the processes cannot share it evenly.
    """
    if effective == 0:
        return BatchSplit(max_size, 1, rank, world_size)
    own, odd = divmod(effective, world_size)
    if odd:
        raise ConfigError(
            f"effective_batch_size {effective}: not a multiple of the {world_size} processes. "
            f"Use {max(own, 1) * world_size}, or another number of processes."
        )
    size = next(size for size in range(min(max_size, own), 0, -1) if own % size == 0)
    return BatchSplit(size, own // size, rank, world_size)


class ShuffledBatchSampler(Sampler[list[int]]):
    """Micro-batches whose order depends on (seed, epoch) alone.

    The images of each effective batch depend on its size, not on how it is split. What is left
    over waits for another epoch's order. Data too small for one effective batch is one step, with
    an image repeated if the processes cannot share it evenly.
    """

    def __init__(self, num_samples: int, split: BatchSplit, *, seed: int) -> None:
        self._num_samples = num_samples
        self._split = split
        self._seed = seed
        self._epoch = 0
        self._first_step = 0

    @property
    def world_size(self) -> int:
        """Return the number of processes that share the data."""
        return self._split.world_size

    @property
    def steps(self) -> int:
        """Return the effective batches of an epoch."""
        return max(1, self._num_full())

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of a step."""
        if self._num_full():
            return self._split.accumulation
        own = -(-self._num_samples // self._split.world_size)
        return -(-own // self._split.batch_size)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the order of `epoch` for the next iteration, and how many steps to skip."""
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for images in islice(self._effective_batches(), self._first_step, None):
            own = images[self._split.rank :: self._split.world_size]
            for start in range(0, len(own), self._split.batch_size):
                yield own[start : start + self._split.batch_size]

    def _effective_batches(self) -> Iterator[list[int]]:
        generator = seeded_generator(self._seed, self._epoch)
        order = torch.randperm(self._num_samples, generator=generator).tolist()
        if self._num_full():
            return self._full_batches(order)
        world_size = self._split.world_size
        return iter([list(islice(cycle(order), -(-len(order) // world_size) * world_size))])

    def _num_full(self) -> int:
        """Count the whole effective batches of an epoch."""
        return self._num_samples // self._split.effective

    def _full_batches(self, order: list[int]) -> Iterator[list[int]]:
        size = self._split.effective
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


class AspectRatioBatchSampler(ShuffledBatchSampler):
    """Shuffled batches that hold portrait or landscape images only, which saves padding."""

    def __init__(self, sizes: Sequence[tuple[int, int]], split: BatchSplit, *, seed: int) -> None:
        """Take the (height, width) of each image."""
        super().__init__(len(sizes), split, seed=seed)
        self._portrait = [height > width for height, width in sizes]
        portrait = sum(self._portrait)
        if min(portrait, len(sizes) - portrait) < split.effective:
            # too few of one kind to fill a batch: they would never be seen
            self._portrait = [False] * len(sizes)

    def _num_full(self) -> int:
        portrait, size = sum(self._portrait), self._split.effective
        return portrait // size + (self._num_samples - portrait) // size

    def _full_batches(self, order: list[int]) -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for position in order:
            group = waiting[self._portrait[position]]
            group.append(position)
            if len(group) == self._split.effective:
                yield group.copy()
                group.clear()


def same_size_batches(
    sizes: Sequence[tuple[int, int]], *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Return batches of images that have one of `sizes` (height, width) after the transform.

    Nothing is padded then, so that results do not depend on the batch size. Large sizes come
    first: what does not fit into memory fails at once. The batches of all ranks hold every image
    once.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for position, size in enumerate(sizes):
        groups.setdefault(size, []).append(position)
    batches = [
        group[start : start + batch_size]
        for _, group in sorted(groups.items(), key=lambda item: -item[0][0] * item[0][1])
        for start in range(0, len(group), batch_size)
    ]
    return batches[rank::world_size]


class NumberedBatches(Sampler[list[SampleKey]]):
    """The batches of a sampler, each image with the number of its step in the epoch."""

    def __init__(self, order: ShuffledBatchSampler) -> None:
        self._order, self._first_step = order, 0

    def set_epoch(self, epoch: int, first_step: int) -> None:
        """See `ShuffledBatchSampler.set_epoch`."""
        self._order.set_epoch(epoch, first_step)
        self._first_step = first_step

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for number, batch in enumerate(self._order):
            step = self._first_step + number // self._order.accumulation
            yield [SampleKey(position, step) for position in batch]
