"""The Triton backend: for NVIDIA GPUs without NVRTC, and for GPUs of other makers."""

import contextlib
import functools
import itertools
import subprocess
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .call import BackendError, Call
from .gpu import GpuBackend

_ELEMENTS = 1024  # per tile
_MAX_WARPS = 16
_MAX_ELEMENTS = 2**20  # per tile: the maximum of Triton
_MIN_CAPABILITY = (8, 0)  # of NVIDIA GPUs that Triton supports


@dataclass(frozen=True)
class TritonLaunch:
    """One launch of a kernel: programs, warps of each, and compile-time constants."""

    programs: int
    warps: int
    constants: dict[str, int]

    @classmethod
    def of(cls, call: Call, *, at_once: int, warps: int, **constants: int) -> "TritonLaunch":
        """Choose the tiles of a call, with `at_once` samples of a query in each.

        A tile of the usual size has `warps` warps, a larger one more.

        Raises:
            BackendError: a tile would be larger than Triton allows.
        """
        n, _, m, d = call.value.shape
        queries, per_level = call.points.shape[1], call.points.shape[4]
        samples, channels = _power_of_two(at_once), _power_of_two(d)
        block = max(_ELEMENTS // (samples * channels), 1)
        elements = block * samples * channels
        if elements > _MAX_ELEMENTS:
            raise BackendError(
                f"triton: {at_once} samples of {d} channels per head do not fit in a tile of "
                f"{_MAX_ELEMENTS} elements. MSDEFORM_BACKEND=reference has no limit."
            )
        warps = min(max(warps * elements // _ELEMENTS, warps), _MAX_WARPS)
        fixed = {
            "HEADS": m, "CHANNELS": d, "SAMPLES": len(call.shapes) * per_level,
            "PER_LEVEL": per_level, "FORM": call.form, "BLOCK_Q": block, "BLOCK_S": samples,
            "BLOCK_D": channels,
        }  # fmt: skip
        return cls(-(-queries // block) * m * n, warps, fixed | constants)


def forward_launch(call: Call) -> TritonLaunch:
    """Return the launch of `msda_forward`: few samples at a time, so that few threads share a sum.

    A thread has 8 elements of a tile: two reads of 16 bytes per corner are in flight.
    """
    samples = call.weights.shape[3] * call.weights.shape[4]
    return TritonLaunch.of(
        call, at_once=min(samples, 4), warps=4, ALL_SAMPLES=_power_of_two(samples)
    )


def backward_launch(call: Call, *, to_locations: bool, deterministic: bool) -> TritonLaunch:
    """Return the launch of `msda_backward`: all samples at once, as the softmax needs their mean.

    A thread has 4 elements of a tile in every dtype, so that reads in half precision have the
    layout of the 16-byte additions in float32.
    """
    samples = call.weights.shape[3] * call.weights.shape[4]
    return TritonLaunch.of(
        call, at_once=samples, warps=8, TO_LOCATIONS=to_locations, DETERMINISTIC=deterministic
    )


class TritonBackend(GpuBackend):
    """Triton, for GPUs of NVIDIA, AMD and Intel, and its interpreter on the CPU."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda", "xpu")

    def unavailable(self, device: torch.device) -> str | None:
        """See `Backend`. Compiles the most common kernel on first use."""
        if device.type not in (*self.devices, "cpu"):
            return f"computes on GPUs, not on {device.type}"
        try:
            kernels = _kernels()
        except ImportError as error:
            return f"Triton cannot be imported: {error}"
        if device.type == "cpu":
            needed = "computes on the CPU only if TRITON_INTERPRET=1 is set before the import"
            return None if kernels.INTERPRETED else needed
        if not getattr(torch, device.type).is_available():
            return "no GPU is visible"
        if device.type == "cuda" and not torch.version.hip:
            capability = torch.cuda.get_device_capability(device)
            if capability < _MIN_CAPABILITY:
                got = (*_MIN_CAPABILITY, *capability)
                return "Triton needs compute capability {}.{}, got {}.{}".format(*got)
        # the most common kernel, run once: Triton also needs a C compiler and CUDA headers
        value = torch.zeros(1, 64, 8, 32, device=device)
        points, weights = value.new_zeros(1, 1, 8, 4, 4, 2), value.new_zeros(1, 1, 8, 4, 4)
        call = Call.of(value, [4, 4] * 4, points, weights, value.new_zeros(1, 1, 4, 2))
        try:
            self.forward(call)
        except (RuntimeError, OSError, subprocess.SubprocessError, kernels.TritonError) as error:
            return f"a kernel does not compile: {str(error).strip().splitlines()[0]}"
        return None

    def forward(self, call: Call) -> Tensor:
        """See `Backend`."""
        output = call.value.new_empty(call.output_shape)
        _run("msda_forward", call, forward_launch(call), output)
        return output

    def start_backward(
        self,
        call: Call,
        scale: Tensor | None,
        *,
        to_locations: bool,
        grad_output: Tensor,
        grad_value: Tensor,
        grad_points: Tensor,
        grad_weights: Tensor,
    ) -> None:
        """See `GpuBackend`."""
        launch = backward_launch(call, to_locations=to_locations, deterministic=scale is not None)
        factor = call.points if scale is None else scale  # not read if there is no scale
        _run(
            "msda_backward",
            call,
            launch,
            grad_output,
            factor,
            grad_value,
            grad_points,
            grad_weights,
        )


def _run(name: str, call: Call, launch: TritonLaunch, *arrays: Tensor) -> None:
    device = call.value.device
    on_cpu = device.type == "cpu"
    with contextlib.nullcontext() if on_cpu else getattr(torch, device.type).device(device):
        levels = _level_table(call.shapes, device)
        reference = call.points if call.reference is None else call.reference  # not read if None
        getattr(_kernels(), name)[(launch.programs,)](
            call.value,
            levels,
            reference,
            call.points,
            call.weights,
            *arrays,
            call.value.shape[1],
            call.points.shape[1],
            **launch.constants,
            num_warps=launch.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )


def _kernels() -> ModuleType:
    from . import triton_kernels  # here, as Triton may be absent and takes a second to import

    return triton_kernels


def _power_of_two(number: int) -> int:
    """Return the smallest power of two >= `number`."""
    return 1 << (number - 1).bit_length()


def _level_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return height, width and first token of each level. Shape: [L,3], int32."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device.type == "cpu" or capturing:  # a graph must own what it reads
        return _filled(shapes, device)
    stream = getattr(torch, device.type).current_stream(device)
    return _kept(shapes, device, stream.stream_id)


def _filled(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    # filled on the device: a copy from the host would wait for all work queued there
    starts = itertools.accumulate((height * width for height, width in shapes), initial=0)
    numbers = [n for shape, start in zip(shapes, starts, strict=False) for n in (*shape, start)]
    scalars = [torch.full((), n, dtype=torch.int32, device=device) for n in numbers]
    return torch.stack(scalars).view(-1, 3)


@functools.lru_cache(maxsize=256)
def _kept(shapes: tuple[tuple[int, int], ...], device: torch.device, stream: int) -> Tensor:
    # one per stream: another stream would have to wait for the fill
    return _filled(shapes, device)
