"""Build and load the CPU kernel, plain C++17: a shared library without PyTorch or Python in it."""

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from . import cache
from .call import BackendError

_BUILD_TIMEOUT = 600  # seconds


def compiler() -> list[str]:
    """Return the C++ compiler and its own arguments: `CXX`, or the first that is found.

    Raises:
        BackendError: none is found, or CXX has a quote without its other one.
    """
    words = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(words)  # as in CXX="ccache g++"
    except ValueError as error:
        raise BackendError(f"CXX={words[:200]!r} is not a command: {error}. Correct it.") from None
    names = chosen[:1] or ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return [found, *chosen[1:]]
    raise BackendError(
        f"no C++ compiler here ({', '.join(names)}). Install g++ or clang++, or set CXX."
    )


# Compiler flags for each level that torch.backends.cpu may report.
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
_FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


def instruction_sets() -> tuple[str, ...]:
    """Return the keys of `INSTRUCTIONS` that exist on this kind of processor."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return tuple(INSTRUCTIONS) if x86 else ("DEFAULT",)


def cpu_library(instructions: str, *, extra_flags: tuple[str, ...] = ()) -> Path:
    """Return the shared library of the CPU kernel for one of `INSTRUCTIONS`.

    Raises:
        BackendError: no compiler, or it failed; the error names the file with its full output.
    """
    cxx = compiler()
    flags = (*_FLAGS, *INSTRUCTIONS[instructions], *extra_flags)
    key = cache.key_of(_run([*cxx, "--version"]).stdout, platform.machine(), *flags)

    def make(path: Path) -> None:
        command = [*cxx, *flags, str(cache.SOURCES / "cpu.cpp"), "-o", str(path)]
        result = _run(command)
        if result.returncode:
            raise BackendError(f"{' '.join(command)}\n\n{result.stdout}")

    name = f"cpu-{instructions.lower()}-{key}.so"
    return cache.built(name, f"the CPU kernel ({instructions})", make)


@functools.cache
def cpu_functions() -> ctypes.CDLL:
    """Return the library for this processor, loaded.

    Raises:
        BackendError: it cannot be built, see `cpu_library`, or does not load.
    """
    found = torch.backends.cpu.get_cpu_capability()
    path = cpu_library(found if found in instruction_sets() else "DEFAULT")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"the CPU kernel does not load: {error}. Delete {path}.") from error


@functools.cache
def openmp() -> int | None:
    """Return the address of GOMP_parallel in PyTorch's own OpenMP, or None.

    The kernel then runs on the same threads; a second pool would compete with them for the cores.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, TypeError, OSError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_BUILD_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{command[0]}: {error}") from error
