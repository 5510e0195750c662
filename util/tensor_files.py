"""Files of tensors: read without running anything they hold, written whole or not at all."""

import argparse
import io
import mmap
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from util.errors import CheckpointError, brief
from util.files import HEAD, atomic_path, open_regular, stand_in
from util.pickled_arrays import is_plain_pickle, load_arrays

# Official checkpoints pickle their command line; forks put paths in it.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
]
_LEGACY_PICKLES = 4  # magic number, version, system, content; then come the raw tensors
_LONGEST_NAME = 1000  # of a class
_SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are not UTF-8
_SMALL = 1 << 20  # values: an expanded tensor of so many may be copied
_QUOTE = "'\""


def load_safely(path: Path) -> Any:
    """Read a `.pth` (any torch version), `.safetensors` or `.pkl` file onto the CPU.

    Only plain tensors, plain Python values and `argparse.Namespace` are built; a file that asks for
    anything else is refused before it can run, and one that claims more than it holds before memory
    is allocated. Tensors may be views of the file on disk. The arrays of a pickle become tensors.

    Raises:
        CheckpointError: the file is missing, empty, damaged, not a checkpoint, or unsafe.
    """
    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".pkl" and _is_plain_pickle(path):
            with open_regular(path) as file:
                return load_arrays(file)
        zipped = zipfile.is_zipfile(path)
        _check_claims(path, zipped=zipped)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # Files of old torch versions warn about storage types that load all the same.
            warnings.simplefilter("ignore")
            # A mapped file cannot be replaced on Windows, where a run rewrites its checkpoint, and
            # has to have a name in UTF-8.
            mapped = os.name == "posix" and zipped and not _SURROGATE.search(str(path))
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        _check_tensors(content, path)
        return content
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: is damaged, or is not a safetensors file ({_one_line(error)}). "
            "Copy or download it again."
        ) from error
    except (MemoryError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {_one_line(error)}.") from error
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise CheckpointError(f"{path}: {_what_is_wrong(error)}") from error


def save_whole(
    path: Path, content: Any, *, before_replacing: Callable[[], None] = lambda: None
) -> None:
    """Replace `path` by `torch.save(content)` in one step, making its folder if needed.

    A crash at any moment leaves the previous file or the new one. `before_replacing` is called
    once the new one is written.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the previous file is
            untouched.
    """
    try:
        try:
            _write(path, content, before_replacing)
        except FileNotFoundError:  # the folder was removed in the meantime: into a new one
            _write(path, content, before_replacing)
    except (OSError, RuntimeError) as error:
        # torch's writer reports a failed write as a RuntimeError, raised on top of the cause
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(
            f"{path}: cannot be written: {cause.strerror or cause}. "
            "Free space or choose another folder; a previous file there is untouched."
        ) from error


def _write(path: Path, content: Any, before_replacing: Callable[[], None]) -> None:
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only now
        before_replacing()


def check_tensors(path: Path) -> None:
    """Compare everything in a `.pth` file with the sums that are stored in it.

    Raises:
        CheckpointError: bytes have changed, or the file is cut.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: {_what_is_wrong(error)}") from error
    if broken is not None:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged: bytes in '{broken}' have changed. "
            "Use an earlier one."
        )


def _is_plain_pickle(path: Path) -> bool:
    with open_regular(path) as file:
        return is_plain_pickle(file.read(64))


def _check_claims(path: Path, *, zipped: bool) -> None:
    """Refuse a file that would become larger in memory than it is, or take very long.

    PyTorch writes its parts uncompressed and one after the other.
    """
    if not zipped:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            for _ in range(_LEGACY_PICKLES):
                if whole.tell() < len(whole):
                    _check_pickle(whole, path)
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(p.compress_type != zipfile.ZIP_STORED for p in parts) or (
            sum(p.file_size for p in parts) > path.stat().st_size
        ):
            raise CheckpointError(
                f"{path}: its parts are compressed or overlap, which PyTorch does not write. "
                "Load the file with torch and save it again, if you trust it."
            )
        for part in parts:
            if part.filename.endswith("data.pkl"):
                _check_pickle(io.BytesIO(archive.read(part)), path)


def _check_pickle(file: Any, path: Path) -> None:
    """Look at what a pickle names, without making any of it.

    Of the calls that PyTorch's reader allows, `bytearray` alone takes a size. For a refusal it
    searches its message, with the name, in a time that grows with the square of its length.
    """
    for opcode, name, _ in pickletools.genops(file):
        if opcode.name != "GLOBAL" or not isinstance(name, str):
            continue
        if name in ("builtins bytearray", "__builtin__ bytearray"):
            raise CheckpointError(
                f"{path}: holds a bytearray, which may take any amount of memory. "
                "Save the state dict alone and use that."
            )
        if len(name) > _LONGEST_NAME:
            raise CheckpointError(
                f"{path}: names a Python object by {len(name)} letters, and is damaged or hostile. "
                "Copy or download it again."
            )


def _check_tensors(content: Any, path: Path) -> None:
    """Refuse tensors that are not plain numbers in memory, all of which are in the file.

    What is nested is walked without recursion: a file can be nested arbitrarily deep.
    """
    waiting, seen = [("", content)], set()
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            if what := _what_is_odd(value):
                raise CheckpointError(
                    f"{path}: the tensor '{place[:100]}' is {what}, which no checkpoint needs. "
                    "Save the state dict again, with plain tensors."
                )
        elif isinstance(value, (dict, list, tuple, set, argparse.Namespace)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            items = value.items() if isinstance(value, dict) else enumerate(value)
            if len(place) < 200:
                waiting += [(f"{place}.{brief(k).strip(_QUOTE)}".lstrip("."), v) for k, v in items]
            else:
                waiting += [(place, v) for _, v in items]


def _what_is_odd(tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_meta:
        return "without data"
    if tensor.is_complex():
        return "complex"
    if tensor.numel() > _SMALL and (
        tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):
        return f"of {tensor.numel()} values, more than the file holds of it"
    return None


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder. Name the checkpoint file in it.")
    try:
        with open_regular(path) as file:
            head = file.read(HEAD)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file. Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_one_line(error)}.") from error
    if not head:
        raise CheckpointError(f"{path}: is empty. Copy the checkpoint again.")
    if what := stand_in(head):
        raise CheckpointError(f"{path}: {what}.")


def _what_is_wrong(error: Exception) -> str:
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"holds the Python object '{refused[1]}', which may run code. If you trust the file, "
            "save its state dict alone and use that."
        )
    if "TorchScript" in text:
        return "is a TorchScript program. Save its state_dict() instead."
    reason = _one_line(error)
    return f"is truncated, damaged or not a checkpoint ({reason}). Copy or download it again."


def _one_line(error: BaseException) -> str:
    """Return the error's kind and the first sentence of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    # torch puts the cause between two pages of advice
    text = text.rpartition("WeightsUnpickler error:")[2].strip() or text
    sentence = re.split(r"\. | Check the documentation", text)[0].rstrip(". ")
    return f"{type(error).__name__}: {sentence[:160]}" if sentence else type(error).__name__
