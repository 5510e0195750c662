"""What loaders return becomes a batch."""

from collections.abc import Sequence

from torch import Tensor

from util.batch import Batch, Target, UnreadableImage, pad_images

Item = tuple[Tensor, Target] | UnreadableImage


def collate(items: Sequence[Item], *, pad_multiple: int = 1) -> Batch:
    """Pad images to one size, of that multiple, and set those that could not be read apart."""
    read = [item for item in items if not isinstance(item, UnreadableImage)]
    return Batch(
        images=pad_images([i for i, _ in read], multiple=pad_multiple) if read else None,
        targets=[target for _, target in read],
        unreadable=[item for item in items if isinstance(item, UnreadableImage)],
    )
