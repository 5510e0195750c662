"""Training batches: collation, and a step's micro-batches together."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from torch.utils.data import DataLoader

from datasets.collate import Item, blank_batch, collate
from datasets.dataset import CocoDetection
from datasets.samplers import ShuffledBatchSampler
from datasets.split import BatchSplit
from datasets.workers import loader_options
from util.batch import Batch


def with_images(micro_batches: Sequence[Batch], *, alone: bool) -> list[Batch]:
    """Replace micro-batches of which no image could be read by blank ones, which count nothing.

    A process of several must train on each, as the others wait for its gradients. A process that
    is `alone` drops them, unless nothing is left.
    """
    kept = [b for b in micro_batches if b.images is not None]
    if alone and kept:
        unreadable = [image for batch in micro_batches for image in batch.unreadable]
        return [replace(kept[0], unreadable=unreadable), *kept[1:]]
    return [b if b.images is not None else blank_batch(b.unreadable) for b in micro_batches]


class TrainLoader(DataLoader[Item]):
    """Shuffled training batches, the part of one process.

    `set_epoch` sets the order and the augmentation together. Iteration gives micro-batches as they
    are, `accumulation` of them for each of `steps` steps an epoch, in which all processes take
    `images`; `effective_batches` gives a step's together, none without an image.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        split: BatchSplit,
        *,
        num_workers: int,
        seed: int,
        aspect_ratio_grouping: bool = False,
        pin_memory: bool = False,
        pad_multiple: int = 1,
    ) -> None:
        sizes = dataset.image_sizes() if aspect_ratio_grouping else ()
        self._order = ShuffledBatchSampler(len(dataset), split, seed=seed, sizes=sizes)
        self._augmentation, self._alone = dataset, split.world_size == 1
        self.steps, self.accumulation = self._order.steps, self._order.accumulation
        self.images = self._order.images
        super().__init__(
            dataset,
            batch_sampler=self._order,
            collate_fn=partial(collate, pad_multiple=pad_multiple),
            **loader_options(num_workers, pin_memory=pin_memory, seed=seed),
        )

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose order and augmentation of `epoch`; call it before each pass over the data.

        A resumed epoch skips its first steps without reading their images.
        """
        self._augmentation.set_epoch(epoch)
        self._order.set_epoch(epoch, first_step)

    def mix_until(self, epoch: int) -> None:
        """Let images be mixed in the epochs before this one; call it between two epochs."""
        self._augmentation.mix_until(epoch)

    def effective_batches(self) -> Iterator[list[Batch]]:
        """Yield this process's micro-batches of every step; see `with_images`."""
        batches: Iterator[Batch] = iter(self)
        while group := list(islice(batches, self.accumulation)):
            yield with_images(group, alone=self._alone)
