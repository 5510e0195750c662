"""Batches from data sets: collation, the order of pictures, and the two kinds of loader."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datasets.coco import CocoDetection, Turn, seeded_generator
from datasets.pictures import PictureDataset
from util.batch import Batch, Target, UnreadableImage, pad_images

Item = tuple[Tensor, Target] | UnreadableImage


def collate(items: Sequence[Item]) -> Batch:
    """Pad the pictures to one size and set those that could not be read apart."""
    read = [item for item in items if not isinstance(item, UnreadableImage)]
    return Batch(
        images=pad_images([image for image, _ in read]) if read else None,
        targets=[target for _, target in read],
        unreadable=[item for item in items if isinstance(item, UnreadableImage)],
    )


def leave_interrupts_to_the_main_process(worker: int) -> None:
    """Let a worker go on when all processes get Ctrl-C or SIGTERM: the main one saves first.

    After SIGTERM it lives half a minute at most, so that nothing waits for it in vain.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class ShuffledBatchSampler(Sampler[list[int]]):
    """Batches in an order that depends on (seed, epoch) alone, shared out among processes.

    Every process gets equally many full batches; what is left over waits for another epoch's
    order. Data too small for one batch each is given out whole, repeating a picture where the
    processes do not share it evenly.
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order of `epoch` for the next iteration, and how many batches to pass over."""
        self._epoch, self._first_batch = epoch, first_batch

    def __len__(self) -> int:
        return max(1, self._num_full())

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._batches(), self._first_batch, None)

    def _batches(self) -> Iterator[list[int]]:
        generator = seeded_generator(self._seed, self._epoch)
        order = torch.randperm(self._num_samples, generator=generator).tolist()
        batches: Iterable[list[int]] = self._full_batches(order)
        if self._num_full() == 0:
            share = -(-len(order) // self._world_size)
            batches = [list(islice(cycle(order), share * self._world_size))]
        for batch in batches:
            yield batch[self._rank :: self._world_size]

    def _step_size(self) -> int:
        return self._batch_size * self._world_size

    def _num_full(self) -> int:
        """Count the steps that all processes can fill together."""
        return self._num_samples // self._step_size()

    def _full_batches(self, order: list[int]) -> Iterator[list[int]]:
        step = self._step_size()
        for start in range(0, len(order) - step + 1, step):
            yield order[start : start + step]


class AspectRatioBatchSampler(ShuffledBatchSampler):
    """Shuffled batches that hold portrait or landscape pictures only, which saves padding."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Take the (height, width) of each picture."""
        super().__init__(
            len(sizes), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
        )
        self._portrait = [height > width for height, width in sizes]
        portrait = sum(self._portrait)
        if min(portrait, len(sizes) - portrait) < self._step_size():
            # too few of one kind for a batch of their own: they would never be seen
            self._portrait = [False] * len(sizes)

    def _num_full(self) -> int:
        portrait, step = sum(self._portrait), self._step_size()
        return portrait // step + (self._num_samples - portrait) // step

    def _full_batches(self, order: list[int]) -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for position in order:
            group = waiting[self._portrait[position]]
            group.append(position)
            if len(group) == self._step_size():
                yield group.copy()
                group.clear()


class SameSizeBatchSampler(Sampler[list[int]]):
    """Every picture once, in batches whose pictures have one size after the transform.

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
        """Take the (height, width) of each picture after the transform."""
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


class NumberedBatches(Sampler[list[Turn]]):
    """The batches of a sampler, each picture with the number of its batch in the epoch."""

    def __init__(self, order: ShuffledBatchSampler) -> None:
        self._order, self._first_batch = order, 0

    def set_epoch(self, epoch: int, first_batch: int) -> None:
        """See `ShuffledBatchSampler.set_epoch`."""
        self._order.set_epoch(epoch, first_batch)
        self._first_batch = first_batch

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[Turn]]:
        for number, batch in enumerate(self._order, start=self._first_batch):
            yield [Turn(position, number) for position in batch]


class TrainLoader(DataLoader[Item]):
    """A loader whose `set_epoch` sets the order and the augmentation together."""

    def __init__(
        self,
        dataset: CocoDetection,
        batch_sampler: ShuffledBatchSampler,
        *,
        num_workers: int,
        pin_memory: bool,
        seed: int,
    ) -> None:
        self._augmentation, self._order = dataset, NumberedBatches(batch_sampler)
        super().__init__(
            dataset,
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_interrupts_to_the_main_process,
            # Its own generator: loading data leaves the model's random numbers alone.
            generator=seeded_generator(seed),
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose order and augmentation of `epoch`; call it before each pass over the data.

        A resumed epoch passes over its first batches without reading them.
        """
        self._augmentation.set_epoch(epoch)
        self._order.set_epoch(epoch, first_batch)


def train_loader(
    dataset: CocoDetection,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    aspect_ratio_grouping: bool = False,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """Return shuffled training batches (`Batch`); `batch_size` counts one process's pictures."""
    common = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
    sampler = (
        AspectRatioBatchSampler(dataset.image_sizes(), **common)
        if aspect_ratio_grouping
        else ShuffledBatchSampler(len(dataset), **common)
    )
    return TrainLoader(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory, seed=seed)


def eval_loader(
    dataset: CocoDetection | PictureDataset,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Item]:
    """Return batches (`Batch`) of every picture once; the processes' shares do not overlap."""
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
        worker_init_fn=leave_interrupts_to_the_main_process,
        generator=seeded_generator(0),
    )
