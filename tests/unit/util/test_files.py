"""Only regular files are opened, of bounded size; YAML is read at a bounded size, too."""

import bz2
import contextlib
import os
import socket
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from util.files import no_text, open_regular, read_regular, write_atomic
from util.yaml_files import read_yaml

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


@pytest.mark.parametrize("make", [fifo, endless, listening, Path.mkdir])
def test_special_files_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    with pytest.raises(OSError, match="x"):
        open_regular(tmp_path / "x")


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("x")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    tracemalloc.start()
    read_regular(tmp_path / "link", 2**34)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    with pytest.raises(OSError, match="5 bytes are more than the 4 that are read"):
        read_regular(tmp_path / "x", 4)
    with open_regular(tmp_path / "x") as file:
        assert file.name == str(tmp_path / "x")


def test_three_letters_make_no_archive() -> None:
    assert no_text(b"BZhang_001.jpg\n") == ""
    assert [no_text(bz2.compress(b"x", level)) for level in (1, 9)] == [
        "is packed (bzip2). Unpack it"
    ] * 2


BILLION = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.long
@pytest.mark.parametrize(
    "text",
    [
        "[" * 1000,
        "x: " + "[" * 60 + "]" * 60,
        f"x: {'9' * 5000}",
        "&a [" + "*a," * 2000 + "]",
        "[" + "a," * 250_000 + "]",
        f"0x{'f' * 5000}: 1",
        "#" * 5_000_001,
    ],
)
def test_yaml_that_would_grow_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises((yaml.YAMLError, ValueError, OSError)):
        read_yaml(tmp_path / "x.yaml")


def test_merged_mappings_do_not_multiply(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(BILLION)
    with contextlib.suppress(yaml.YAMLError):  # of PyYAML before it left out repeated keys
        assert read_yaml(tmp_path / "x.yaml")["a11"] == {"k": "v"}


def test_yaml_anchors_work(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {k: 1, l: 2}\nb:\n  <<: *a\n  l: 3\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}}


def test_a_file_is_on_the_disk_before_it_replaces_another_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave the new name with nothing in it, or the old name again."""
    path, synced, real = tmp_path / "x", [], os.fsync
    path.write_text("old")

    def fsync(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else os.fstat(handle).st_size
        synced.append((kind, path.read_text()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(path, "newer")
    assert synced == [(5, "old"), ("folder", "newer")]
