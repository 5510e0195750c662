"""Files of tensors: what loads, what is refused, and in which words."""

import argparse
import os
import pickle
import shutil
import zipfile
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from util.errors import CheckpointError
from util.tensor_files import check_tensors, load_safely, save_whole


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def official_content() -> dict[str, Any]:
    args = argparse.Namespace(lr=2e-4, output_dir=PosixPath("runs/r50"), masks=False, scales=[1, 2])
    return {"model": {"w": torch.arange(6.0).view(2, 3)}, "args": args, "epoch": 49}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_official_content_loads(tmp_path: Path, zipped: bool) -> None:
    torch.save(official_content(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_safely(tmp_path / "a.pth")
    assert loaded["model"]["w"].equal(torch.arange(6.0).view(2, 3))
    assert loaded["args"].output_dir == PurePosixPath("runs/r50")
    assert vars(loaded["args"])["scales"] == [1, 2]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("how", ["zip", "legacy", "raw"])
def test_malicious_file_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pth"
    if how == "raw":
        path.write_bytes(pickle.dumps({"model": Payload(trap)}, protocol=2))
    else:
        torch.save({"model": Payload(trap)}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pth: holds") as caught:
        load_safely(path)
    assert "\n" not in str(caught.value)
    if how != "raw":
        assert "mkdir" in str(caught.value)
    assert not trap.exists()


def test_namespace_cannot_smuggle_a_call(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"args": argparse.Namespace(hidden=Payload(trap))}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="mkdir"):
        load_safely(tmp_path / "a.pth")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"some notes", "truncated, damaged or not a checkpoint"),
        (b"  <!DOCTYPE html><p>Sign in", "web page"),
        (b"\xef\xbb\xbf" + b"\n" * 80 + b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x80\x02}q\x00.", "damaged or not a checkpoint"),
    ],
)
def test_foreign_files_are_named_for_what_they_are(
    tmp_path: Path, content: bytes, what: str
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as caught:
        load_safely(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_foreign_zip(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_safely(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_safely(tmp_path)
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match=r"z\.pth"):
        load_safely(tmp_path / "z.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 0.999))
def test_truncated_file_is_an_error(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "t.pth"
    torch.save(official_content(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError) as caught:
        load_safely(path)
    assert "\n" not in str(caught.value)


def test_safetensors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    assert load_safely(tmp_path / "a.safetensors")["w"].equal(torch.ones(2, 2))
    damaged = (tmp_path / "a.safetensors").read_bytes()[:-3]
    (tmp_path / "b.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: is damaged, or is not a safeten"):
        load_safely(tmp_path / "b.safetensors")


def test_a_loaded_file_can_be_replaced_and_its_tensors_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_whole(path, {"w": torch.zeros(1000)})
    first = load_safely(path)["w"]
    save_whole(path, {"w": torch.ones(1000)})
    first += 5
    assert first.eq(5).all()
    assert load_safely(path)["w"].eq(1).all()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(element=st.integers(0, 999), bit=st.integers(0, 31))
def test_a_changed_bit_of_a_tensor_is_found_by_its_sum(
    tmp_path: Path, element: int, bit: int
) -> None:
    path = tmp_path / "a.pth"
    values = torch.arange(1, 1001, dtype=torch.float32)
    save_whole(path, {"w": values})
    check_tensors(path)
    content = bytearray(path.read_bytes())
    start = bytes(content).index(values.numpy().tobytes())
    content[start + 4 * element + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    load_safely(path)  # the reader itself does not notice
    with pytest.raises(CheckpointError, match=r"a\.pth: the checkpoint is damaged") as caught:
        check_tensors(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_removed_while_a_file_is_written_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    removed: list[bool] = []

    def remove_once() -> None:
        if not removed:
            removed.append(True)
            shutil.rmtree(folder)

    save_whole(folder / "a.pth", {"w": torch.ones(3)}, before_replacing=remove_once)
    assert removed
    assert load_safely(folder / "a.pth")["w"].equal(torch.ones(3))
    assert [path.name for path in folder.iterdir()] == ["a.pth"]
