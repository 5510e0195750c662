"""Evaluation batches: every image once, without padding."""

from collections.abc import Sequence

from torch.utils.data import DataLoader

from datasets.collate import Item, collate
from datasets.dataset import CocoDetection, ImageList
from datasets.workers import loader_options


def eval_loader(
    dataset: CocoDetection | ImageList,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Item]:
    """Return batches (`Batch`) of every image once; the parts of processes do not overlap."""
    sizes = [
        dataset.transform.output_size(*size) or (0, 0) if all(size) else (0, 0)
        for size in dataset.image_sizes()
    ]
    return DataLoader(
        dataset,
        batch_sampler=same_size_batches(
            sizes, batch_size=batch_size, rank=rank, world_size=world_size
        ),
        collate_fn=collate,
        **loader_options(num_workers, pin_memory=pin_memory, seed=0),
    )


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
