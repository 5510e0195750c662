"""Loader processes: how many there are, and how they start and end."""

import signal
import sys
from functools import partial
from typing import Any

from PIL import Image

from datasets.dataset import seeded_generator
from datasets.images import limit_pixels
from util.cores import available_cores

_MAX_WORKERS = 8  # by default: each holds batches in memory
_SECONDS_AFTER_SIGTERM = 30  # for the main process to save in


def loader_processes(num_workers: int, *, local_size: int = 1) -> int:
    """Return how many processes load data for each of the `local_size` of a run on this machine.

    See the option `num_workers`.
    """
    if num_workers >= 0:
        return num_workers
    return max(1, min(_MAX_WORKERS, available_cores() // local_size))


def loader_options(num_workers: int, *, pin_memory: bool, seed: int) -> dict[str, Any]:
    """Return the arguments that every `DataLoader` gets: its processes and their start."""
    num_workers = loader_processes(num_workers)
    return {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": partial(start_worker, Image.MAX_IMAGE_PIXELS),
        # Forked workers share the index with this process. Since Python 3.14 the default is to
        # send each of them a copy.
        "multiprocessing_context": "fork" if num_workers and sys.platform == "linux" else None,
        # Its own generator: loading data leaves the model's random numbers alone.
        "generator": seeded_generator(seed),
    }


def start_worker(max_pixels: int | None, worker: int) -> None:
    """Let a worker continue when all processes get Ctrl-C or SIGTERM: the main one saves first.

    After SIGTERM it ends within half a minute, so that nothing waits for it in vain. A worker that
    was not forked has its own limit of an image's pixels, set here to the main process's.
    """
    limit_pixels(max_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))
