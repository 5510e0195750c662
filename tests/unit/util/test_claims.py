"""Files that claim more than they hold are refused within little memory and time."""

import pickle
import resource
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.engine.test_checkpoint import run_content
from util.errors import CheckpointError
from util.tensor_files import load_safely

LIMIT = 300_000_000  # bytes that a refusal may take


def in_little_memory(path: Path) -> str:
    """Return what the reader says of a file, with so much memory more than it has already."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            load_safely(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))
    return str(caught.value)


def bomb(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(10)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        with archive.open("archive/data/1", "w", force_zip64=True) as part:
            for _ in range(400):
                part.write(bytes(10**6))


class Bytes:
    """Unpickled, it is as many bytes as it says."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**11,)


def byte_array(path: Path) -> None:
    torch.save({"model": Bytes()}, path)


def byte_array_in_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": Bytes()}, protocol=2))


def expanded(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1).expand(10**11)}}, path)


def sparse(path: Path) -> None:
    torch.save({"model": {"w": torch.eye(3).to_sparse()}}, path)


def meta(path: Path) -> None:
    torch.save({"model": {"w": torch.empty(10**12, device="meta")}}, path)


def quantised(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch will stop making them
        tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    torch.save({"model": {"w": tensor}}, path)


def complex_numbers(path: Path) -> None:
    torch.save({1: [{"w": torch.ones(2, dtype=torch.complex64)}]}, path)


def long_name(path: Path) -> None:
    path.write_bytes(b"\x80\x02c" + b"x" * 10**6 + b"\ny\n.")


def nested(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


CLAIMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "zip bomb": (bomb, "compressed or overlap"),
    "byte array": (byte_array, "holds a bytearray"),
    "byte array in a pickle": (byte_array_in_a_pickle, "holds a bytearray"),
    "expanded": (expanded, "'model.w' is of 100000000000 values, more than the file holds"),
    "sparse": (sparse, "'model.w' is sparse"),
    "meta": (meta, "'model.w' is without data"),
    "quantised": (quantised, "'model.w' is quantised"),
    "complex": (complex_numbers, "'1.0.w' is complex"),
    "long name": (long_name, "by 1000002 letters"),
    "nested": (nested, "x.pth: "),
}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CLAIMS)
def test_a_claim_is_refused_in_little_memory(tmp_path: Path, case: str) -> None:
    make, words = CLAIMS[case]
    make(tmp_path / "x.pth")
    assert words in in_little_memory(tmp_path / "x.pth")


def test_shared_and_small_tensors_load(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    content = {"a": shared, "b": shared.view(2, 3), "c": torch.zeros(1).expand(9), "d": [None, {}]}
    torch.save(content, tmp_path / "x.pth")
    assert load_safely(tmp_path / "x.pth")["c"].shape == (9,)
    torch.save(run_content(), tmp_path / "x.pth")
    assert load_safely(tmp_path / "x.pth")["epoch"] == 1
