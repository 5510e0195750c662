"""Choose the backend of a call: the fastest that runs here, or the one that the user named."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch

from .call import Backend, BackendError
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton_backend import TritonBackend

_REFERENCE = ReferenceBackend()
# the fastest first
_ORDER: tuple[Backend, ...] = (CudaBackend(), CpuBackend(), TritonBackend(), _REFERENCE)
BACKENDS = {backend.name: backend for backend in _ORDER}
_VARIABLE = "MSDEFORM_BACKEND"
_forced: str | None = None


def backend_for(device: torch.device) -> Backend:
    """Return the backend for tensors on `device`.

    Raises:
        BackendError: `MSDEFORM_BACKEND` or `use_backend` names one that cannot run here.
    """
    return _chosen(_forced or os.environ.get(_VARIABLE) or None, device)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend only, which overrides `MSDEFORM_BACKEND`.

    Raises:
        BackendError: no backend has this name.
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{_VARIABLE}: no backend '{name}'. Choose from {', '.join(BACKENDS)}.")
    return name


@functools.cache
def _chosen(name: str | None, device: torch.device) -> Backend:
    if name:
        backend = BACKENDS[_known(name)]
        if reason := backend.unavailable(device):
            raise BackendError(f"{_VARIABLE}={name} on {device}: {reason}")
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
    return _REFERENCE
