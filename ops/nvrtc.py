"""CUDA without a CUDA toolkit: compile with PyTorch's NVRTC, launch with the driver.

Called by ctypes: `cuda.bindings` comes only with the CUDA wheels of torch 2.10 and later, so that
using it would add a second path for the same dozen calls.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import cache
from .call import BackendError


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "0").split(".")[0]
    if major == "0":
        raise BackendError("this PyTorch is built without CUDA")
    # PyTorch's own library finds the NVRTC that it was built with
    beside_torch = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    errors, soname = [], f"libnvrtc.so.{major}"
    for name in (str(beside_torch), soname, f"{soname}.0", "libnvrtc.so"):
        try:
            library = ctypes.CDLL(name)
            library.nvrtcCompileProgram  # noqa: B018  (the name is looked up only here)
            return library
        except (OSError, AttributeError) as error:
            errors.append(str(error))
    raise BackendError(f"PyTorch's CUDA compiler (NVRTC {major}) does not load: {errors[-1]}")


def version() -> str:
    """Return the version of the compiler, such as 12.8."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@functools.cache
def architectures() -> tuple[int, ...]:
    """Return the compute capabilities that the compiler supports: 80, 90, ..."""
    count = ctypes.c_int()
    _check(_nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(_nvrtc().nvrtcGetSupportedArchs(found))
    return tuple(found)


def target(capability: int) -> str:
    """Return the compiler's target for `capability`: `sm_NN`, or `compute_NN` on a newer GPU.

    For a GPU newer than the compiler this is the newest intermediate code, which the driver
    translates.

    Raises:
        BackendError: the GPU is older than every target of the compiler.
    """
    known = architectures()
    if capability in known:
        return f"sm_{capability}"
    older = [a for a in known if a < capability]
    if not older:
        raise BackendError(
            f"NVRTC {version()} does not support compute capability {capability / 10}"
        )
    return f"compute_{max(older)}"


def compile_program(source: str, options: Sequence[str], arch: str) -> bytes:
    """Return machine code (`sm_NN`) or PTX (`compute_NN`) of a CUDA source.

    Raises:
        BackendError: the compiler rejected it; with its options and full output.
    """
    lib, program = _nvrtc(), ctypes.c_void_p()
    _check(
        lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"ms_deform_attn.cu", 0, None, None
        )
    )
    try:
        flags = [f"--gpu-architecture={arch}", "-std=c++17", *options]
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if lib.nvrtcCompileProgram(program, len(flags), array):
            log = _text(program, lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog).rstrip(b"\0")
            raise BackendError(f"nvrtc {' '.join(flags)}\n\n{log.decode(errors='replace')}")
        if arch.startswith("sm_"):
            return _text(program, lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN)
        return _text(program, lib.nvrtcGetPTXSize, lib.nvrtcGetPTX)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, size_of: Any, get: Any) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _check(result: int) -> None:
    if result:
        name = _nvrtc().nvrtcGetErrorString
        name.restype = ctypes.c_char_p
        raise BackendError(f"NVRTC: {name(result).decode()}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"the NVIDIA driver does not load: {error}") from error


def _check_driver(result: int, doing: str) -> None:
    if result:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        _driver().cuGetErrorString(result, ctypes.byref(text))
        said = f"{(name.value or b'').decode()}: {(text.value or b'').decode()}"
        raise RuntimeError(f"ms_deform_attn: {doing} failed, {said} ({result})")


def _need_context() -> None:
    """Make PyTorch's context current in a thread that has not used the GPU yet."""
    driver, context, device = _driver(), ctypes.c_void_p(), torch.cuda.current_device()
    _check_driver(driver.cuCtxGetCurrent(ctypes.byref(context)), "getting the context")
    if not context:
        retain = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        _check_driver(retain, f"retaining the context of GPU {device}")
        _check_driver(driver.cuCtxSetCurrent(context), f"setting the context of GPU {device}")


def load_functions(code: bytes, names: Sequence[str]) -> dict[str, Callable[..., None]]:
    """Load machine code into the current device's context; return its kernels by name.

    Call a kernel as `kernel(blocks, threads, stream, arguments)`, where `arguments` is the one
    structure that it takes. A failed launch raises RuntimeError.
    """
    driver, module = _driver(), ctypes.c_void_p()
    _need_context()
    _check_driver(driver.cuModuleLoadData(ctypes.byref(module), code), "loading the CUDA kernel")
    launches: dict[str, Callable[..., None]] = {}
    for name in names:
        function = ctypes.c_void_p()
        _check_driver(
            driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
            f"finding {name}",
        )
        launches[name] = functools.partial(_launch, function, name)
    return launches


def _launch(
    function: ctypes.c_void_p,
    name: str,
    blocks: int,
    threads: int,
    stream: int,
    arguments: ctypes.Structure,
) -> None:
    _need_context()
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    result = _driver().cuLaunchKernel(
        function, blocks, 1, 1, threads, 1, 1, 0, ctypes.c_void_p(stream), pointers, None
    )
    _check_driver(result, f"launching {name} with {blocks} blocks of {threads} threads")


def inlined_source(path: Path) -> str:
    """Return a source with the headers beside it inlined, so that no search path is needed."""

    def header(line: "re.Match[str]") -> str:
        return inlined_source(path.parent / line[1])

    source = path.read_text().replace("#pragma once\n", "")
    return re.sub(r'^#include "(.*)"$', header, source, flags=re.M)


def cached_program(source: Path, options: Sequence[str], arch: str, what: str) -> bytes:
    """Return the compiled `source`, from the cache if it is there.

    Raises:
        BackendError: the compiler rejected it; the error names the file with the full output.
    """
    key = cache.key_of(version(), arch, *options)

    def make(path: Path) -> None:
        path.write_bytes(compile_program(inlined_source(source), options, arch))

    suffix = "cubin" if arch.startswith("sm_") else "ptx"
    return cache.built(f"cuda-{arch}-{key}.{suffix}", f"{what} for {arch}", make).read_bytes()
