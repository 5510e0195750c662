"""Random generators of Python, NumPy and torch: seeded together, saved and restored."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CUDA_BYTES = 16  # of a generator's state: seed and offset


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator as tensors and JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned; GPUs that were not saved, or are missing, are skipped."""
    torch.set_rng_state(state["torch"])
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def check_rng_state(state: Any) -> None:
    """Check that `set_rng_state` can restore a state.

    Raises:
        ValueError: it is none that a generator could have; NumPy would read past its end.
    """
    parts = {"torch": Tensor, "cuda": list, "python": list, "numpy": list}
    for name, kind in parts.items():
        if not isinstance(state, Mapping) or not isinstance(state.get(name), kind):
            raise ValueError(f"it has no state of the generator '{name}'")
    for name, tensor in [("torch", state["torch"]), *(("cuda", t) for t in state["cuda"])]:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise ValueError(f"the state of '{name}' is not bytes")
    try:
        torch.Generator().set_state(state["torch"])
        version, words, gauss = state["python"]
        random.Random().setstate((version, tuple(words), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        fitting = kind == "MT19937" and len(keys) == 624 and 0 <= position <= 624
        if not fitting or has_gauss not in (0, 1):
            raise ValueError("the state of 'numpy' is not of its generator")
        array, rest = np.array(keys, dtype=np.uint32), (int(position), int(has_gauss))
        np.random.RandomState().set_state((kind, array, *rest, float(cached)))
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{' '.join(str(error).split())[:100]}") from error
    if type(gauss) not in (type(None), float) or type(position) is not int:
        raise ValueError("the state of 'python' or 'numpy' has parts of other types")
    if any(len(tensor) != _CUDA_BYTES for tensor in state["cuda"]):
        raise ValueError("the state of 'cuda' has another size")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore every random generator when the block ends."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
