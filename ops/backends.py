"""What a backend is, and which one computes: the fastest that runs here, or one the user named."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .call import BackendError, Call, Gradients
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton_backend import TritonBackend


class Backend(Protocol):
    """A way to compute a call. Raises `BackendError` if it cannot run here."""

    name: str
    devices: tuple[str, ...]  # device types it is made for; () for any

    def unavailable(self, device: torch.device) -> str | None:
        """Return in one line why it cannot run on `device`, or None if it can."""

    def forward(self, call: Call) -> Tensor:
        """Return the output [N,Q,M*D] in the dtype of the value."""

    def backward(self, call: Call, grad: Tensor, *, need_reference: bool) -> Gradients:
        """Return the gradients from `grad`, that of the output, [N,Q,M*D] and contiguous."""


REFERENCE = ReferenceBackend()
# the fastest first
_ORDER: tuple[Backend, ...] = (CudaBackend(), CpuBackend(), TritonBackend(), REFERENCE)
BACKENDS = {backend.name: backend for backend in _ORDER}
VARIABLE = "MSDEFORM_BACKEND"  # of the environment, with the name of a backend
forced: str | None = None  # the name in `use_backend`


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend only, which overrides `MSDEFORM_BACKEND`.

    Raises:
        BackendError: no backend has this name.
    """
    global forced
    before, forced = forced, _known(name)
    try:
        yield
    finally:
        forced = before


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{VARIABLE}: no backend '{name}'. Choose from {', '.join(BACKENDS)}.")
    return name


@functools.cache
def chosen(name: str | None, device: torch.device) -> Backend:
    """Return the backend of this name, else the first that can run, for tensors on `device`.

    Raises:
        BackendError: there is none of this name, or it cannot run here.
    """
    if name:
        backend = BACKENDS[_known(name)]
        if reason := backend.unavailable(device):
            raise BackendError(f"{VARIABLE}={name} on {device}: {reason}")
        return backend
    reasons: list[str] = []
    for backend in BACKENDS.values():
        if reason := backend.unavailable(device):
            if device.type in backend.devices:
                reasons.append(f"{backend.name}: {reason}")
            continue
        if reasons:
            text = f"ms_deform_attn: slower backend '{backend.name}' on {device}. "
            warnings.warn(text + " ".join(reasons), stacklevel=2)
        return backend
    return REFERENCE
