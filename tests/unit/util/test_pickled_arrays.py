"""Pickles of arrays: read as numpy reads them, and nothing else is ever called or made."""

import collections
import io
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from util.errors import CheckpointError
from util.tensor_files import load_safely

ARRAYS: dict[str, Any] = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "by columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.array([1.5, -2], dtype=np.float16),
    "big-endian": np.arange(4, dtype=">i4"),
    "bytes": np.array([[1], [255]], dtype=np.uint8),
    "flags": np.array([True, False]),
    "none": np.zeros((0, 3), dtype=np.float32),
    "point": np.array(7, dtype=np.int64),
    "number": np.float32(2.5),
    "part": np.arange(20, dtype=np.int16)[::3],
}


def save(folder: Path, content: Any, protocol: int = 4) -> Path:
    path = folder / "w.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_those_of_numpy(tmp_path: Path, name: str, protocol: int) -> None:
    array = ARRAYS[name]
    content = collections.OrderedDict(model={"w": array, "list": [array, 3]}, by="me", n=None)
    loaded = load_safely(save(tmp_path, content, protocol))
    assert (loaded["by"], loaded["n"], loaded["model"]["list"][1]) == ("me", None, 3)
    for found in (loaded["model"]["w"], loaded["model"]["list"][0]):
        assert isinstance(found, torch.Tensor)
        assert found.numpy().dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(found.numpy(), array)
        found.copy_(found.clone())  # they may be written to


def test_python_2_wrote_bytes_as_text(tmp_path: Path) -> None:
    """What numpy wrote there: STRING opcodes for the type and the values."""
    values = np.array([1, -2], dtype="<f4").tobytes()
    data = b"".join(
        (
            b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b",
            b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R",
            b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89U" + bytes([len(values)]) + values + b"tbs.",
        )
    )
    assert pickle.loads(data, encoding="latin1")["w"].tolist() == [1, -2]
    assert load_safely(save(tmp_path, data))["w"].tolist() == [1, -2]


class Call:
    """Unpickled, it calls something."""

    def __init__(self, function: Any, *values: Any) -> None:
        self.made = function, values

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_calls_are_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "trap"
    calls = [
        Call(os.system, f"mkdir {trap}"),
        Call(os.mkdir, str(trap)),
        Call(eval, f"__import__('os').mkdir({str(trap)!r})"),
        Call(getattr, "", "join"),
        Call(bytearray, 10**12),
        Call(np.zeros, (10**12,)),
    ]
    for call in calls:
        content = {"model": {"w": np.ones(2)}, "x": call}
        with pytest.raises(CheckpointError, match="holds the Python object") as caught:
            load_safely(save(tmp_path, content, protocol))
        assert "\n" not in str(caught.value)
    assert not trap.exists()


ARRAY = pickle.dumps({"w": np.ones(4, dtype=np.float32)}, 2)
MAKE = b"cnumpy.core.multiarray\n_reconstruct\n"
HOSTILE = {
    "an object array": pickle.dumps(np.array([None, 1], dtype=object)),
    "a larger shape": ARRAY.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "a negative shape": ARRAY.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
    "a structure": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
    "a longer type": ARRAY.replace(b"f4", b"f9"),
    "no state": MAKE + b".",
    "an array without state": MAKE + b")R.",
    "a changed function": MAKE + b"(N}U\x08__call__I1\nstb.",
    "a table of the size of memory": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a class by its number": b"\x80\x02\x82\x01.",
    "an object outside the file": b"\x80\x02U\x01xQ.",
    "nothing on the stack": b"\x80\x02.",
    "no end": ARRAY[:-1],
    "half": ARRAY[: len(ARRAY) // 2],
    "a key nested without end": b"\x80\x02}" + b")" + b"\x85" * 3_000_000 + b"Ns.",
    "an attribute of a dictionary": b"\x80\x02}}U\x05itemsNsb.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_damaged_pickles_are_refused_in_a_moment(tmp_path: Path, name: str) -> None:
    path, start = save(tmp_path, HOSTILE[name]), time.monotonic()
    with pytest.raises(CheckpointError, match=r"w\.pkl: ") as caught:
        load_safely(path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 3


def test_arrays_that_share_bytes_are_not_larger_than_the_file(tmp_path: Path) -> None:
    """A million bytes, of which a hundred arrays are made."""
    data = io.BytesIO()
    data.write(b"\x80\x02](B" + struct.pack("<I", 10**6) + b"\0" * 10**6 + b"q\x010")
    one = (
        MAKE + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01J" + struct.pack("<i", 10**6)
        + b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89h\x01tb"
    )  # fmt: skip
    data.write(one * 100 + b"e.")
    assert len(pickle.loads(data.getvalue(), encoding="latin1")) == 100
    with pytest.raises(CheckpointError, match="arrays of more bytes than the file has"):
        load_safely(save(tmp_path, data.getvalue()))


def test_containers_may_hold_themselves(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": np.ones(1)}
    content["again"] = content
    loaded = load_safely(save(tmp_path, content))
    assert loaded["again"] is loaded
    assert loaded["w"].tolist() == [1]


def test_what_torch_saved_under_the_suffix_still_loads(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(2)}, tmp_path / "t.pkl", _use_new_zipfile_serialization=zipped)
        assert load_safely(tmp_path / "t.pkl")["w"].tolist() == [1, 1]
