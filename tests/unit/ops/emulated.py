"""The CUDA backend with its kernel run on the CPU, lane by lane, by `cuda_emulator.cpp`."""

import ctypes
import mmap
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from ops.cache import SOURCES
from ops.compiler import compiler
from ops.cuda import CudaBackend, CudaLaunch, KernelKind, arguments_type

_FLAGS = (
    "-O1", "-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-fsanitize=undefined",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{SOURCES}",
)  # fmt: skip
_NO_ACCESS = 0  # PROT_NONE


class EmulatedBackend(CudaBackend):
    """Everything of the CUDA backend but the GPU.

    Undefined behaviour in the kernel shows on standard error, as lines with `runtime error`.

    Args:
        folder: where compiled kernels are kept.
        reverse: run the blocks, and the lanes of a warp, from the last to the first.
    """

    def __init__(self, folder: Path, *, reverse: bool = False) -> None:
        self._folder, self._reverse = folder, reverse

    def reversed(self) -> "EmulatedBackend":
        """Return the backend that runs blocks and lanes in the opposite order."""
        return EmulatedBackend(self._folder, reverse=not self._reverse)

    def library(self, kind: KernelKind) -> ctypes.CDLL:
        """Return the kernel for `kind`, compiled if it has not been yet."""
        path = self._folder / f"{abs(hash(kind))}.so"
        if not path.exists():
            source = Path(__file__).with_name("cuda_emulator.cpp")
            command = [*compiler(), *_FLAGS, *kind.options, str(source), "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(path))

    def run(self, name: str, launch: CudaLaunch) -> None:
        """Compute in copies of the arrays that end where memory does."""
        library = self.library(launch.kind)
        assert library.emulated_lanes() == launch.kind.lanes
        assert library.emulated_threads() == launch.kind.threads
        assert library.emulated_size() == ctypes.sizeof(arguments_type(launch.kind.levels))
        arguments = type(launch.arguments).from_buffer_copy(launch.arguments)
        rooms = {key: _Room(tensor) for key, tensor in launch.arrays.items()}
        for key, room in rooms.items():
            setattr(arguments, key, room.copy.data_ptr())
        status = library.emulate(
            name == "msda_backward", ctypes.byref(arguments), launch.blocks, self._reverse
        )
        assert status <= 0, f"{name}: lanes of a warp part ways in block {status - 1}"
        assert status == 0, f"{name}: block {-status - 1} reads or writes beyond an array"
        for key, tensor in launch.arrays.items():
            assert not any(part.any() for part in rooms[key].rest), f"{name} writes outside {key}"
            tensor.copy_(rooms[key].copy)


class _Room:
    """A copy of a tensor before memory that cannot be read; its other neighbours are zeros."""

    def __init__(self, tensor: Tensor) -> None:
        page = mmap.PAGESIZE
        size = -(-tensor.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        beyond = ctypes.c_void_p(address + size)
        assert ctypes.CDLL(None).mprotect(beyond, page, _NO_ACCESS) == 0
        room = torch.frombuffer(memory, dtype=torch.uint8, count=size)
        start = (size - tensor.nbytes) // 16 * 16  # as aligned as PyTorch's own memory must be
        self.copy = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.copy.copy_(tensor)
        self.rest = (room[:start], room[start + tensor.nbytes :])
