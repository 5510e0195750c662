"""The compiled CPU backend, which calls the shared library through its C interface."""

import ctypes
import functools
import struct

import torch
from torch import Tensor

from .call import STORAGE, BackendError, Call, Gradients
from .compiler import cpu_functions, openmp

_TOO_LARGE = 2  # `Outcome` of `csrc/problem.h`
# `Problem` of `csrc/problem.h`, of fields of 8 bytes: arrays, the process's OpenMP, sizes, threads
_ARRAYS = struct.Struct("@10P")
_SIZES = struct.Struct("@P10q")
_THREADS = struct.Struct("@q")


class CpuBackend:
    """C++ for any processor, with the widest vectors that PyTorch reports for this one."""

    name = "cpu"
    devices: tuple[str, ...] = ("cpu",)

    def unavailable(self, device: torch.device) -> str | None:
        """See `Backend`. Builds the kernel on first use."""
        if device.type != "cpu":
            return f"computes on the CPU, not on {device.type}"
        try:
            cpu_functions()
        except BackendError as error:
            return str(error)
        return None

    def forward(self, call: Call) -> Tensor:
        """See `Backend`."""
        output = call.value.new_empty(call.output_shape)
        _run(cpu_functions().msda_forward, call, output=output)
        return output

    def backward(self, call: Call, grad: Tensor, *, need_reference: bool) -> Gradients:
        """See `Backend`."""
        value, points, weights = (
            torch.empty_like(t) for t in (call.value, call.points, call.weights)
        )
        _run(
            cpu_functions().msda_backward, call, to_locations=need_reference, grad_output=grad,
            grad_value=value, grad_points=points, grad_weights=weights,
        )  # fmt: skip
        if need_reference:
            return Gradients(value, *call.of_offsets_and_reference(points), weights)
        return Gradients(value, points, None, weights)


def _run(
    function: "ctypes._FuncPointer",
    call: Call,
    *,
    to_locations: bool = False,
    output: Tensor | None = None,
    grad_output: Tensor | None = None,
    grad_value: Tensor | None = None,
    grad_points: Tensor | None = None,
    grad_weights: Tensor | None = None,
) -> None:
    shapes, sizes = _sizes(
        call.shapes, call.value.shape, call.points.shape, call.value.dtype, call.form, to_locations
    )
    results = (output, grad_output, grad_value, grad_points, grad_weights)
    arrays = _ARRAYS.pack(
        call.value.data_ptr(), ctypes.addressof(shapes),
        0 if call.reference is None else call.reference.data_ptr(),
        call.points.data_ptr(), call.weights.data_ptr(),
        *(0 if result is None else result.data_ptr() for result in results),
    )  # fmt: skip
    outcome = function(arrays + sizes + _THREADS.pack(torch.get_num_threads()))
    if outcome == _TOO_LARGE:
        _, s, _, d = call.value.shape
        raise ValueError(
            f"ms_deform_attn: {s} tokens of {d} channels are more than the CPU kernel can index. "
            "MSDEFORM_BACKEND=reference has no limit."
        )
    if outcome:
        raise MemoryError("ms_deform_attn: out of memory for the CPU kernel's buffers.")


@functools.lru_cache(maxsize=512)
def _sizes(
    shapes: tuple[tuple[int, int], ...],
    value: torch.Size,
    points: torch.Size,
    dtype: torch.dtype,
    form: int,
    to_locations: bool,
) -> tuple["ctypes.Array[ctypes.c_int64]", bytes]:
    """Return the level sizes in C, and the part of `Problem` that depends on sizes alone.

    Both are the same in every layer and step that has these sizes, and take longer to make than a
    decoder's layer of few queries to compute.
    """
    n, s, m, d = value
    sides = [side for shape in shapes for side in shape]
    sizes = _SIZES.pack(
        openmp() or 0, n, s, m, d, points[1], len(shapes), points[4], STORAGE[dtype], form,
        to_locations,
    )  # fmt: skip
    return (ctypes.c_int64 * len(sides))(*sides), sizes
