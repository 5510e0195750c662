"""What every test shares: fixed seeds, a clean default dtype, data kept beside the repository."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import register_random, settings
from torch import Tensor

from util.console import show_messages

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Timing says nothing on a loaded machine; the same examples on every run make failures repeat.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")


class _TorchRandom:
    """Torch's generator as hypothesis wants it, so that an example can be run again."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps only a weak reference
register_random(_TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed and print messages in each test; undo a changed default dtype after it."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    np.random.seed(0)
    show_messages()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a function from a name to its path in `../shared`; it skips where that is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs ../shared/{name}, which is not beside this repository")
        return path

    return find
