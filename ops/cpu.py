"""The compiled CPU backend, which calls the shared library through its C interface."""

import ctypes

import torch
from torch import Tensor

from .call import STORAGE, BackendError, Call, Gradients
from .compiler import cpu_functions, openmp

_TOO_LARGE = 2  # `Outcome` of `csrc/problem.h`
_POINTERS = (
    "value", "shapes", "reference", "points", "weights", "output", "grad_output", "grad_value",
    "grad_points", "grad_weights", "parallel",
)  # fmt: skip
_NUMBERS = (
    "batch", "tokens", "heads", "channels", "queries", "levels", "per_level", "storage", "form",
    "to_locations", "threads",
)  # fmt: skip


class _Problem(ctypes.Structure):
    """`Problem` of `csrc/problem.h`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    ]


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
    function: "ctypes._FuncPointer", call: Call, *, to_locations: bool = False, **results: Tensor
) -> None:
    sides = [side for shape in call.shapes for side in shape]
    shapes = (ctypes.c_int64 * len(sides))(*sides)
    arrays = {
        "value": call.value, "reference": call.reference, "points": call.points,
        "weights": call.weights, **results,
    }  # fmt: skip
    n, s, m, d = call.value.shape
    problem = _Problem(
        **{name: array.data_ptr() for name, array in arrays.items() if array is not None},
        shapes=ctypes.addressof(shapes), parallel=openmp(),
        batch=n, tokens=s, heads=m, channels=d, queries=call.points.shape[1],
        levels=len(call.shapes), per_level=call.points.shape[4],
        storage=STORAGE[call.value.dtype],
        form=call.form,
        to_locations=to_locations, threads=torch.get_num_threads(),
    )  # fmt: skip
    outcome = function(ctypes.byref(problem))
    if outcome == _TOO_LARGE:
        raise ValueError(
            f"ms_deform_attn: {s} tokens of {d} channels are more than the CPU kernel can index. "
            "MSDEFORM_BACKEND=reference has no limit."
        )
    if outcome:
        raise MemoryError("ms_deform_attn: out of memory for the CPU kernel's buffers.")
