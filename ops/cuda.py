"""The compiled CUDA backend: a small program per kind of call, compiled when first needed."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cache, nvrtc
from .call import STORAGE, BackendError, Call, arithmetic_dtype
from .gpu import GpuBackend

_POINTERS = (
    "value", "reference", "points", "weights", "output", "grad_output", "grad_value",
    "grad_points", "grad_weights", "scale",
)  # fmt: skip
_SHARED_BYTES = 48 * 1024
_MAX_SAMPLES = 1535  # per query and head: what a block's shared memory holds in float64
_MAX_TOKENS = 2**27 - 1  # of an image, as four bits of an index tell which corners exist
_MAX_CHANNELS = 32 * 64  # that a warp can hold in registers


@dataclass(frozen=True)
class KernelKind:
    """What a program is compiled for: the constants of `csrc/cuda.cu`."""

    dtype: torch.dtype
    heads: int
    channels: int
    levels: int
    per_level: int
    form: int = 0
    to_locations: bool = False
    deterministic: bool = False

    @property
    def options(self) -> list[str]:
        """Return the constants as compiler options."""
        constants = {
            "STORAGE": STORAGE[self.dtype], "HEADS": self.heads, "CHANNELS": self.channels,
            "LEVELS": self.levels, "PER_LEVEL": self.per_level, "FORM": self.form,
            "TO_LOCATIONS": int(self.to_locations), "DETERMINISTIC": int(self.deterministic),
        }  # fmt: skip
        return [f"-DMSDA_{name}={number}" for name, number in constants.items()]

    @property
    def lanes(self) -> int:
        """Lanes of a warp that compute one query and head; `kLanes` in the source."""
        wide = 16 // self.dtype.itemsize
        while self.channels % wide:
            wide //= 2
        lanes = 1
        while lanes < 32 and (lanes < self.channels // wide or not self._fits(32, lanes)):
            lanes *= 2
        return lanes

    @property
    def threads(self) -> int:
        """Threads of a block; `kThreads` in the source."""
        return next((t for t in (128, 64) if self._fits(t, self.lanes)), 32)

    def _fits(self, threads: int, lanes: int) -> bool:
        sample = 4 * arithmetic_dtype(self.dtype).itemsize
        slots = self.levels * self.per_level | 1
        return threads // lanes * slots * sample <= _SHARED_BYTES

    def program(self, target: str) -> bytes:
        """Return code for `sm_NN` or `compute_NN`, from the cache or compiled now."""
        samples = self.levels * self.per_level
        if samples > _MAX_SAMPLES or self.channels > _MAX_CHANNELS:
            raise BackendError(
                f"cuda: {samples} samples of {self.channels} channels per head are more than the "
                f"maximum, {_MAX_SAMPLES} samples and {_MAX_CHANNELS} channels. "
                "MSDEFORM_BACKEND=reference has no limit."
            )
        name = str(self.dtype).removeprefix("torch.")
        what = (
            f"the CUDA kernel ({name}, {self.heads} heads of {self.channels} channels, "
            f"{samples} samples)"
        )
        return nvrtc.cached_program(cache.SOURCES / "cuda.cu", self.options, target, what)


@functools.cache
def arguments_type(levels: int) -> type[ctypes.Structure]:
    """Return `Arguments` of `csrc/cuda.cu`, field by field."""

    class Arguments(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_void_p) for name in _POINTERS),
            *((name, ctypes.c_int) for name in ("tokens", "queries")),
            *((name, ctypes.c_int * levels) for name in ("height", "width", "start")),
        ]

    return Arguments


@dataclass(frozen=True)
class CudaLaunch:
    """A call in the form that the kernel takes."""

    kind: KernelKind
    arguments: ctypes.Structure
    blocks: int
    arrays: dict[str, Tensor]  # that `arguments` points to, by field


def prepare(
    call: Call,
    *,
    to_locations: bool = False,
    scale: Tensor | None = None,
    **results: Tensor,
) -> CudaLaunch:
    """Return the launch that computes `call` into `results`; `scale` as for `start_backward`."""
    n, s, m, d = call.value.shape
    queries, levels, per_level = call.points.shape[1], len(call.shapes), call.points.shape[4]
    if s > _MAX_TOKENS:
        raise BackendError(
            f"cuda: {s} tokens of an image are more than the maximum, {_MAX_TOKENS}. "
            "MSDEFORM_BACKEND=reference has no limit."
        )
    kind = KernelKind(
        call.value.dtype, m, d, levels, per_level, call.form, to_locations, scale is not None
    )
    given = {
        "value": call.value, "reference": call.reference, "points": call.points,
        "weights": call.weights, "scale": scale, **results,
    }  # fmt: skip
    # rows are read 16 bytes at a time; a view of a tensor may start anywhere
    arrays = {
        name: tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
        for name, tensor in given.items()
        if tensor is not None
    }
    heights, widths = zip(*call.shapes, strict=True)
    starts = tuple(sum(h * w for h, w in call.shapes[:level]) for level in range(levels))
    arguments = arguments_type(levels)(
        **{name: tensor.data_ptr() for name, tensor in arrays.items()},
        tokens=s,
        queries=queries,
        height=heights,
        width=widths,
        start=starts,
    )
    tiles = -(-queries // (kind.threads // kind.lanes))
    return CudaLaunch(kind, arguments, tiles * m * n, arrays)


@functools.cache
def _kernels(kind: KernelKind, device: int) -> dict[str, Callable[..., None]]:
    major, minor = torch.cuda.get_device_capability(device)
    program = kind.program(nvrtc.target(10 * major + minor))
    with torch.cuda.device(device):
        return nvrtc.load_functions(program, ("msda_forward", "msda_backward"))


class CudaBackend(GpuBackend):
    """CUDA C++ for NVIDIA GPUs."""

    name = "cuda"
    devices: tuple[str, ...] = ("cuda",)

    def unavailable(self, device: torch.device) -> str | None:
        """See `Backend`. Builds the most common program on first use."""
        if device.type != "cuda":
            return f"computes on NVIDIA GPUs, not on {device.type}"
        if torch.version.hip:
            return "this PyTorch is built for ROCm"
        try:
            index = torch.cuda.current_device() if device.index is None else device.index
            _kernels(KernelKind(torch.float32, heads=8, channels=32, levels=4, per_level=4), index)
        except (BackendError, RuntimeError) as error:
            return str(error)
        return None

    def forward(self, call: Call) -> Tensor:
        """See `Backend`."""
        output = call.value.new_empty(call.output_shape)
        self.run("msda_forward", prepare(call, output=output))
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
        launch = prepare(
            call,
            to_locations=to_locations,
            scale=scale,
            grad_output=grad_output,
            grad_value=grad_value,
            grad_points=grad_points,
            grad_weights=grad_weights,
        )
        self.run("msda_backward", launch)

    def run(self, name: str, launch: CudaLaunch) -> None:
        """Start the kernel `name` on the current stream."""
        device = launch.arrays["value"].device.index
        with torch.cuda.device(device):
            kernel = _kernels(launch.kind, device)[name]
            stream = torch.cuda.current_stream().cuda_stream
            kernel(launch.blocks, launch.kind.threads, stream, launch.arguments)
