"""Padded batches: what the loader hands to the engine and the model, and their way to a device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Target = dict[str, Tensor]


@dataclass(frozen=True)
class PaddedBatch:
    """Images of unequal size in one tensor.

    Shape: images [N,3,H,W], normalised; mask [N,H,W] bool, True = padding.
    `sizes` are the unpadded (height, width) in pixels.
    """

    images: Tensor
    mask: Tensor
    sizes: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str) -> "PaddedBatch":
        """Return the batch on `device`."""
        return PaddedBatch(
            self.images.to(device, non_blocking=True),
            self.mask.to(device, non_blocking=True),
            self.sizes,
        )

    def pin_memory(self) -> "PaddedBatch":
        """Return the batch in page-locked memory (called by the data loader)."""
        return PaddedBatch(self.images.pin_memory(), self.mask.pin_memory(), self.sizes)


@dataclass(frozen=True)
class EffectiveBatch:
    """What all images of an update have in common, however many processes and parts share them.

    `boxes` counts those of all `images`, `most_boxes` those of the image that has the most. Random
    draws for an image depend on `seed`, `epoch` and its id.
    """

    boxes: int
    most_boxes: int
    seed: int = 0
    epoch: int = 0
    images: int = 0

    @staticmethod
    def of(targets: "Sequence[Target]") -> "EffectiveBatch":
        """Return the description of a batch that is an effective batch by itself."""
        counts = [len(t["labels"]) for t in targets]
        return EffectiveBatch(sum(counts), max(counts, default=0), images=len(counts))


@dataclass(frozen=True)
class UnreadableImage:
    """An image that could not be decoded; the loader carries it instead of pixels."""

    image_id: int
    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """One step's data.

    `images` is None when no image of the batch could be read. Each target holds
    `image_id` [], `labels` [K] int64 in 0..num_classes-1, `boxes` [K,4] normalised cxcywh
    relative to the unpadded image, `orig_size` [2] and `size` [2] as (height, width). A `blank`
    batch stands in where a process of several has no image, and counts nothing.
    """

    images: PaddedBatch | None
    targets: list[Target]
    unreadable: list[UnreadableImage]
    blank: bool = False

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by the data loader)."""
        images = None if self.images is None else self.images.pin_memory()
        targets = [{key: value.pin_memory() for key, value in t.items()} for t in self.targets]
        return replace(self, images=images, targets=targets)


def pad_images(images: Sequence[Tensor], multiple: int = 1) -> PaddedBatch:
    """Pad images at the right and bottom with zeros to their common size.

    With `multiple`, both sides are rounded up to one, so that batches have few different sizes.
    Shape: each image [3,H,W], normalised.
    """
    sizes = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        batch[i, :, :h, :w] = image
        mask[i, :h, :w] = False
    return PaddedBatch(batch, mask, sizes)


class Uploads:
    """Copies batches to a device; on a GPU, beside the computation on the batch before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches with their images on the device; targets stay on the host."""
        following = self._start(batches[0])
        for after in [*batches[1:], None]:
            batch = self._wait(following)
            if after is not None:
                following = self._start(after)
            yield batch

    def _start(self, batch: Batch) -> Batch:
        """Begin a copy; the result may be used after `_wait`."""
        assert batch.images is not None
        if self._stream is None:
            return replace(batch, images=batch.images.to(self._device))
        with torch.cuda.stream(self._stream):
            return replace(batch, images=batch.images.to(self._device))

    def _wait(self, batch: Batch) -> Batch:
        """Make the computation wait for the copies so far."""
        if self._stream is not None and batch.images is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (batch.images.images, batch.images.mask):
                tensor.record_stream(current)
        return batch
