"""Decoded images in memory that all loader processes share, up to a limit."""

import multiprocessing

import torch
from torch import Tensor

from datasets.sample import CHANNELS, Size
from util.errors import ConfigError

_PATIENCE = 1.0  # seconds: a process that was killed may have held the lock


class ImageCache:
    """Images that were decoded once, as 8-bit pixels, as many as there is room for.

    Nothing is thrown out: an epoch needs each image once, so a newer one is worth no more than an
    older one. The memory is allocated at once, so that it cannot run out later, and is freed with
    the last process, however that ends.
    """

    def __init__(self, num_images: int, num_bytes: int) -> None:
        """Allocate the shared buffer.

        Raises:
            ConfigError: there is not enough memory.
        """
        try:
            # as torch's own collation does: `share_memory_` would fill as much again, and copy it
            storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ConfigError(
                f"cache_images: there are not {num_bytes / 1e9:.2f} GB of shared memory left "
                "(`df -h /dev/shm` shows it). Lower it, or give a container more."
            ) from error
        self._pixels = torch.empty(0, dtype=torch.uint8).set_(storage)
        # of each image: where it begins (-1: not here), decoded and whole (height, width)
        self._table: Tensor = torch.full((num_images, 5), -1, dtype=torch.int64)
        self._used: Tensor = torch.zeros((), dtype=torch.int64)
        for shared in (self._table, self._used):
            shared.share_memory_()  # type: ignore[no-untyped-call]
        self._lock = multiprocessing.Lock()

    def get(self, position: int) -> tuple[Tensor, Size] | None:
        """Return pixels [3,h,w] uint8, not to be written to, and the whole image's size."""
        start, h, w, height, width = self._table[position].tolist()
        if start < 0:
            return None
        part = self._pixels[start : start + CHANNELS * h * w]
        return part.view(h, w, CHANNELS).permute(2, 0, 1), (height, width)

    def put(self, position: int, pixels: Tensor, size: Size) -> None:
        """Keep pixels [3,h,w] uint8 of an image, if there is room."""
        _, height, width = pixels.shape
        if not self._lock.acquire(timeout=_PATIENCE):
            return
        try:
            start = int(self._used)
            if start + pixels.numel() > len(self._pixels) or int(self._table[position, 0]) >= 0:
                return
            self._used += pixels.numel()
        finally:
            self._lock.release()
        part = self._pixels[start : start + pixels.numel()]
        part.view(height, width, CHANNELS).copy_(pixels.permute(1, 2, 0))
        self._table[position, 1:] = torch.tensor([height, width, *size])
        self._table[position, 0] = start  # last: from here on others read it
