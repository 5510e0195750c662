"""The order of images: which of them each effective batch holds."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from math import ceil

import torch
from torch.utils.data import Sampler

from datasets.dataset import SampleKey, seeded_generator
from datasets.split import BatchSplit


class ShuffledBatchSampler(Sampler[list[SampleKey]]):
    """Micro-batches of one process, whose order depends on (seed, epoch) alone.

    The images of each effective batch depend on its size, not on how it is split. What is left
    over waits for another epoch's order. Data too small for one effective batch is one step, with
    an image repeated if the processes cannot share it evenly.

    `steps` are the effective batches of an epoch, `accumulation` the micro-batches of each and
    `images` its images, those of all processes. Every image comes with the number of its step in
    the epoch.
    """

    def __init__(
        self,
        num_images: int,
        split: BatchSplit,
        *,
        seed: int,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        """With the (height, width) of each image, a step's are all portrait or all landscape."""
        self._split = split
        self._seed = seed
        self._portrait = [height > width for height, width in sizes]
        num_portrait = sum(self._portrait)
        if min(num_portrait, num_images - num_portrait) < split.effective:
            # too few of one kind to fill a batch: they would never be seen
            self._portrait = [False] * num_images
        num_full = sum(n // split.effective for n in Counter(self._portrait).values())
        self._too_small = num_full == 0
        own_images = split.batch_size * split.accumulation
        if self._too_small:
            own_images = ceil(num_images / split.world_size)
        self.steps, self.images = max(1, num_full), own_images * split.world_size
        self.accumulation = ceil(own_images / split.batch_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the order of `epoch` for the next iteration, and how many steps to skip."""
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        split = self._split
        numbered = enumerate(self._effective_batches())
        for step, images in islice(numbered, self._first_step, None):
            own = [SampleKey(position, step) for position in images[split.rank :: split.world_size]]
            for start in range(0, len(own), split.batch_size):
                yield own[start : start + split.batch_size]

    def _effective_batches(self) -> Iterator[list[int]]:
        generator = seeded_generator(self._seed, self._epoch)
        order = torch.randperm(len(self._portrait), generator=generator).tolist()
        if self._too_small:
            missing = -len(order) % self._split.world_size  # for each process to have as many
            yield list(islice(cycle(order), len(order) + missing))
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for position in order:
            group = waiting[self._portrait[position]]
            group.append(position)
            if len(group) == self._split.effective:
                yield group.copy()
                group.clear()
