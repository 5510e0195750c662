"""Batches from data sets: collation, the order of images, and the two kinds of loader."""

import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datasets.dataset import CocoDetection, ImageList, SampleKey, seeded_generator
from util.batch import Batch, Target, UnreadableImage, pad_images
from util.cores import available_cores
from util.errors import ConfigError

_MOST_WORKERS = 8  # by default: each holds batches in memory
_BLANK_SIDE = 64  # pixels of the image that stands in where a process has none

Item = tuple[Tensor, Target] | UnreadableImage


def collate(items: Sequence[Item], *, pad_multiple: int = 1) -> Batch:
    """Pad images to one size, of that multiple, and set those that could not be read apart."""
    read = [item for item in items if not isinstance(item, UnreadableImage)]
    return Batch(
        images=pad_images([i for i, _ in read], multiple=pad_multiple) if read else None,
        targets=[target for _, target in read],
        unreadable=[item for item in items if isinstance(item, UnreadableImage)],
    )


def ignore_sigint(worker: int) -> None:
    """Let a worker go on when all processes get Ctrl-C or SIGTERM: the main one saves first.

    After SIGTERM it lives half a minute at most, so that nothing waits for it in vain.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def with_images(micro_batches: Sequence[Batch], *, alone: bool) -> list[Batch]:
    """Replace micro-batches of which no image could be read by blank ones, which count nothing.

    A process of several must train on each, as the others wait for its gradients. A process that
    is `alone` drops them, unless nothing is left.
    """
    kept = [b for b in micro_batches if b.images is not None]
    if alone and kept:
        unreadable = [image for batch in micro_batches for image in batch.unreadable]
        return [replace(kept[0], unreadable=unreadable), *kept[1:]]
    return [b if b.images is not None else _blank(b.unreadable) for b in micro_batches]


def _blank(unreadable: list[UnreadableImage]) -> Batch:
    size = torch.tensor([_BLANK_SIDE, _BLANK_SIDE])
    target = {
        "image_id": torch.tensor(-1),
        "labels": torch.zeros(0, dtype=torch.int64),
        "boxes": torch.zeros(0, 4),
        "orig_size": size,
        "size": size,
    }
    images = pad_images([torch.zeros(3, _BLANK_SIDE, _BLANK_SIDE)])
    return Batch(images, [target], unreadable, blank=True)


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


def split_batch(effective: int, *, most: int, rank: int = 0, world_size: int = 1) -> BatchSplit:
    """Divide an effective batch among processes, and each part into micro-batches.

    `most` bounds a micro-batch; an effective batch of 0 asks for one such in each process.

    Raises:
        ConfigError: the processes cannot share it evenly.
    """
    if effective == 0:
        return BatchSplit(most, 1, rank, world_size)
    own, odd = divmod(effective, world_size)
    if odd:
        raise ConfigError(
            f"--effective_batch_size {effective}: expected a multiple of the {world_size} "
            f"processes. Take {max(own, 1) * world_size}, or other processes."
        )
    size = next(size for size in range(min(most, own), 0, -1) if own % size == 0)
    return BatchSplit(size, own // size, rank, world_size)


def loader_processes(num_workers: int, *, local_size: int = 1) -> int:
    """Return how many processes load data for each of the `local_size` of a run on this machine.

    See the option `num_workers`.
    """
    if num_workers >= 0:
        return num_workers
    return max(1, min(_MOST_WORKERS, available_cores() // local_size))


def _start_method(num_workers: int) -> str | None:
    """Return how loader processes begin: on Linux as copies, which share the index with us.

    Python's own choice there, since 3.14, is to send each of them an index of its own.
    """
    return "fork" if num_workers and sys.platform == "linux" else None


class ShuffledBatchSampler(Sampler[list[int]]):
    """Micro-batches whose order depends on (seed, epoch) alone.

    The images of each effective batch depend on its size, not on how it is shared out. What is
    left over waits for another epoch's order. Data too small for one effective batch is one step,
    repeating an image where the processes do not share it evenly.
    """

    def __init__(self, num_samples: int, share: BatchSplit, *, seed: int) -> None:
        self._num_samples = num_samples
        self._share = share
        self._seed = seed
        self._epoch = 0
        self._first_step = 0

    @property
    def world_size(self) -> int:
        """Return the number of processes that share the data."""
        return self._share.world_size

    @property
    def steps(self) -> int:
        """Return the effective batches of an epoch."""
        return max(1, self._num_full())

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of a step."""
        if self._num_full():
            return self._share.accumulation
        own = -(-self._num_samples // self._share.world_size)
        return -(-own // self._share.batch_size)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the order of `epoch` for the next iteration, and how many steps to pass over."""
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for images in islice(self._effective_batches(), self._first_step, None):
            own = images[self._share.rank :: self._share.world_size]
            for start in range(0, len(own), self._share.batch_size):
                yield own[start : start + self._share.batch_size]

    def _effective_batches(self) -> Iterator[list[int]]:
        generator = seeded_generator(self._seed, self._epoch)
        order = torch.randperm(self._num_samples, generator=generator).tolist()
        if self._num_full():
            return self._full_batches(order)
        world_size = self._share.world_size
        return iter([list(islice(cycle(order), -(-len(order) // world_size) * world_size))])

    def _num_full(self) -> int:
        """Count the whole effective batches of an epoch."""
        return self._num_samples // self._share.effective

    def _full_batches(self, order: list[int]) -> Iterator[list[int]]:
        size = self._share.effective
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


class AspectRatioBatchSampler(ShuffledBatchSampler):
    """Shuffled batches that hold portrait or landscape images only, which saves padding."""

    def __init__(self, sizes: Sequence[tuple[int, int]], share: BatchSplit, *, seed: int) -> None:
        """Take the (height, width) of each image."""
        super().__init__(len(sizes), share, seed=seed)
        self._portrait = [height > width for height, width in sizes]
        portrait = sum(self._portrait)
        if min(portrait, len(sizes) - portrait) < share.effective:
            # too few of one kind for a batch of their own: they would never be seen
            self._portrait = [False] * len(sizes)

    def _num_full(self) -> int:
        portrait, size = sum(self._portrait), self._share.effective
        return portrait // size + (self._num_samples - portrait) // size

    def _full_batches(self, order: list[int]) -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for position in order:
            group = waiting[self._portrait[position]]
            group.append(position)
            if len(group) == self._share.effective:
                yield group.copy()
                group.clear()


class SameSizeBatchSampler(Sampler[list[int]]):
    """Every image once, in batches whose images have one size after the transform.

    Nothing is padded then, so that results do not depend on the batch size. Large sizes come
    first: what does not fit into memory fails at once.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Take the (height, width) of each image after the transform."""
        groups: dict[tuple[int, int], list[int]] = {}
        for position, size in enumerate(sizes):
            groups.setdefault(size, []).append(position)
        batches = [
            group[start : start + batch_size]
            for _, group in sorted(groups.items(), key=lambda item: -item[0][0] * item[0][1])
            for start in range(0, len(group), batch_size)
        ]
        self._batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


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


class TrainLoader(DataLoader[Item]):
    """A loader whose `set_epoch` sets the order and the augmentation together.

    Iteration gives micro-batches as they are, `accumulation` of them for each of `steps` steps an
    epoch; `effective_batches` gives a step's together, none without an image.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        batch_sampler: ShuffledBatchSampler,
        *,
        num_workers: int,
        pin_memory: bool,
        seed: int,
        pad_multiple: int,
    ) -> None:
        self._augmentation, self._order = dataset, NumberedBatches(batch_sampler)
        self._world_size = batch_sampler.world_size
        self.steps, self.accumulation = batch_sampler.steps, batch_sampler.accumulation
        num_workers = loader_processes(num_workers)
        super().__init__(
            dataset,
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=partial(collate, pad_multiple=pad_multiple),
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_sigint,
            multiprocessing_context=_start_method(num_workers),
            # Its own generator: loading data leaves the model's random numbers alone.
            generator=seeded_generator(seed),
        )

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose order and augmentation of `epoch`; call it before each pass over the data.

        A resumed epoch passes over its first steps without reading their images.
        """
        self._augmentation.set_epoch(epoch)
        self._order.set_epoch(epoch, first_step)

    def effective_batches(self) -> Iterator[list[Batch]]:
        """Yield this process's micro-batches of every step; see `with_images`."""
        batches: Iterator[Batch] = iter(self)
        while group := list(islice(batches, self.accumulation)):
            yield with_images(group, alone=self._world_size == 1)


def train_loader(
    dataset: CocoDetection,
    share: BatchSplit,
    *,
    num_workers: int,
    seed: int,
    aspect_ratio_grouping: bool = False,
    pin_memory: bool = False,
    pad_multiple: int = 1,
) -> TrainLoader:
    """Return shuffled training batches (`Batch`), the part of one process."""
    sampler = (
        AspectRatioBatchSampler(dataset.image_sizes(), share, seed=seed)
        if aspect_ratio_grouping
        else ShuffledBatchSampler(len(dataset), share, seed=seed)
    )
    return TrainLoader(
        dataset,
        sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        seed=seed,
        pad_multiple=pad_multiple,
    )


def eval_loader(
    dataset: CocoDetection | ImageList,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Item]:
    """Return batches (`Batch`) of every image once; the processes' shares do not overlap."""
    num_workers = loader_processes(num_workers)
    sizes = [
        dataset.output_size(*size) or (0, 0) if all(size) else (0, 0)
        for size in dataset.image_sizes()
    ]
    return DataLoader(
        dataset,
        batch_sampler=SameSizeBatchSampler(
            sizes, batch_size=batch_size, rank=rank, world_size=world_size
        ),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_sigint,
        multiprocessing_context=_start_method(num_workers),
        generator=seeded_generator(0),
    )
