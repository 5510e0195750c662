"""What loaders return becomes a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from util.batch import Batch, Target, UnreadableImage, pad_images

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


def blank_batch(unreadable: list[UnreadableImage]) -> Batch:
    """Return a batch of one black image without boxes, which counts nothing."""
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
