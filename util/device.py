"""Choice of device, and copies to it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from util.batch import Batch
from util.distributed import World
from util.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the first GPU, else the CPU.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name}: cannot be used here: {reason} "
            "`python main.py doctor` lists what is there."
        ) from error
    return device


def own_device(device: torch.device, world: World) -> torch.device:
    """Return the GPU of this process where several share a machine, else `device`."""
    if device.type != "cuda" or world.size == 1:
        return device
    own = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(own)
    return own


def set_deterministic() -> None:
    """Choose algorithms that give the same bits on every run; call it before a GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


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
