"""Checkpoints: whole or untouched, loadable by the safe reader, errors in one line."""

import argparse
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import (
    KEYS,
    CheckpointFolder,
    check_classes,
    check_same,
    load_checkpoint,
    save_checkpoint,
)
from util.errors import CheckpointError
from util.random_state import rng_state, set_rng_state

ROOT = Path(__file__).parents[3]


def run_content() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 1,
        "classes": {"ids": [3], "names": ["cat"]},
        "config": {"model": {"num_queries": 5}},
        "progress": {"step": 10, "rng": rng_state()},
        "best": {"ap": 0.5},
        "versions": {"torch": str(torch.__version__)},
    }


def test_run_comes_back_exactly(tmp_path: Path) -> None:
    content = run_content()
    save_checkpoint(tmp_path / "new" / "last.pth", content)
    loaded = load_checkpoint(tmp_path / "new" / "last.pth")
    assert set(loaded) == set(KEYS)
    assert loaded["model"]["weight"].equal(content["model"]["weight"])
    moment = content["optimizer"]["state"][0]["exp_avg"]
    assert loaded["optimizer"]["state"][0]["exp_avg"].equal(moment)
    for key in ("lr_scheduler", "classes", "config", "best", "versions", "epoch"):
        assert loaded[key] == content[key]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["last.pth"]


def test_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            float(torch.rand(1)), random.random(), random.gauss(0, 1),
            float(np.random.rand()), float(np.random.randn()),
        ]  # fmt: skip

    random.gauss(0, 1)  # leaves a second normal number in store
    np.random.randn()
    save_checkpoint(tmp_path / "last.pth", run_content())
    expected = [draw() for _ in range(3)]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    set_rng_state(load_checkpoint(tmp_path / "last.pth")["progress"]["rng"])
    assert [draw() for _ in range(3)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_continue() -> None:
    state = rng_state()
    assert len(state["cuda"]) == torch.cuda.device_count()
    expected = torch.rand(4, device="cuda")
    set_rng_state(state)
    assert torch.rand(4, device="cuda").equal(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(np.float64(0.5), "float64"), (Path("x"), "Path"), (argparse.Namespace(), "Namespace")],
)
def test_value_that_would_not_load_is_refused_before_writing(
    tmp_path: Path, value: Any, kind: str
) -> None:
    with pytest.raises(TypeError, match=rf"\['best'\]\['ap'\].*{kind}"):
        save_checkpoint(tmp_path / "last.pth", run_content() | {"best": {"ap": value}})
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from engine.checkpoint import save_checkpoint
from util.errors import CheckpointError
from util.random_state import rng_state, set_rng_state
path = Path(sys.argv[1])
save_checkpoint(path, {"epoch": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, {"model": {"w": torch.zeros(1_000_000)}})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file size")
def test_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: cannot be written: ")
    assert done.stdout.count("\n") == 1
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "last.pth", run_content())


def test_other_files_cannot_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {}, "args": argparse.Namespace(), "epoch": 49}, path)
    with pytest.raises(CheckpointError, match="official checkpoint.*`finetune`"):
        load_checkpoint(path)
    content = run_content()
    del content["optimizer"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="lacks optimizer"):
        load_checkpoint(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(CheckpointError, match="`finetune`"):
        load_checkpoint(path)


def of_step(step: int) -> dict[str, Any]:
    """Return a run's content at a step, with a tensor that takes most of the file."""
    return run_content() | {
        "model": {"weight": torch.full((20_000,), float(step))},
        "progress": {"step": step, "rng": rng_state()},
    }


def step_in(path: Path) -> int:
    return int(load_checkpoint(path)["progress"]["step"])


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, {"last.pth": 5}), (3, {"last.pth": 5, "step_00000004.pth": 4, "step_00000003.pth": 3})],
)
def test_so_many_checkpoints_are_kept(tmp_path: Path, keep: int, kept: dict[str, int]) -> None:
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in (1, 2, 3, 4, 5, 5):  # an epoch's end is saved twice
        folder.save(of_step(step))
    assert {path.name: step_in(path) for path in tmp_path.iterdir()} == kept


def test_a_folder_without_hard_links_works_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no hard links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3):
        folder.save(of_step(step))
    found = {path.name: step_in(path) for path in tmp_path.iterdir()}
    assert found == {"last.pth": 3, "step_00000002.pth": 2}
    folder.last.unlink()  # killed between the two renames
    assert folder.newest_sound() == tmp_path / "step_00000002.pth"


@pytest.mark.parametrize("length", [0, 1, 10, 0.1, 0.5, 0.9, -1])
def test_a_truncated_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], length: float
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2):
        folder.save(of_step(step))
    whole = folder.last.read_bytes()
    folder.last.write_bytes(whole[: int(length * len(whole)) if 0 < length < 1 else int(length)])
    assert folder.newest_sound() == tmp_path / "step_00000001.pth"
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {folder.last}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("place", [0.05, 0.3, 0.5, 0.8])
def test_one_changed_bit_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: float
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2):
        folder.save(of_step(step))
    content = bytearray(folder.last.read_bytes())
    content[int(place * len(content))] ^= 4
    folder.last.write_bytes(content)
    assert folder.newest_sound() == tmp_path / "step_00000001.pth"
    assert capsys.readouterr().out.count("warning: ") == 1


def test_no_checkpoint_and_none_that_is_sound(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    assert folder.newest_sound() is None
    for step in (1, 2):
        folder.save(of_step(step))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged") as caught:
        folder.newest_sound()
    assert "\n" not in str(caught.value)


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(of_step(1))
    (tmp_path / ".last.pth.77.tmp").write_bytes(b"half")
    assert folder.newest_sound() == folder.last
    folder.remove_remains()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2):
        folder.save(of_step(step))

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        folder.save(of_step(3))
    found = {path.name: step_in(path) for path in tmp_path.iterdir()}
    assert found == {"last.pth": 2, "step_00000001.pth": 1}


@pytest.mark.parametrize(
    ("saved", "difference"),
    [
        ({"ids": [3, 7], "names": ["dog", "cat"]}, ""),
        (
            {"ids": [3, 7], "names": ["dog", "cow"]},
            "1 is 'cow' (id 7) there and 'cat' (id 7",
        ),
        (
            {"ids": [2, 7], "names": ["dog", "cat"]},
            "0 is 'dog' (id 2) there and 'dog' (id 3",
        ),
        ({"ids": [3], "names": ["dog"]}, "number 1 is missing there and 'cat' (id 7) here"),
        (
            {"ids": [3, 7, 9], "names": ["dog", "cat", "cow"]},
            "2 is 'cow' (id 9) there and missing",
        ),
        ({"ids": [3, 7], "names": ["dog"]}, "number 1 is None (id 7) there"),
        ({"ids": [3, torch.ones(2)], "names": ["dog", "cat"]}, "number 1 is 'cat' (id tensor"),
        ({"ids": "37", "names": ["dog", "cat"]}, "is not a checkpoint of a run: classes is"),
    ],
)
def test_the_first_class_that_differs_is_named(saved: dict[str, Any], difference: str) -> None:
    data = {"ids": [3, 7], "names": ["dog", "cat"]}
    if not difference:
        check_classes(saved, data, Path("last.pth"))
        return
    with pytest.raises(CheckpointError, match=re.escape(difference)) as caught:
        check_classes(saved, data, Path("last.pth"))
    assert "\n" not in str(caught.value)


def test_differing_models_are_named() -> None:
    saved = {"num_queries": 300, "two_stage": False, "nheads": 8}
    check_same("model", saved, dict(saved), "last.pth")
    with pytest.raises(CheckpointError) as caught:
        check_same("model", saved, {**saved, "num_queries": 100, "two_stage": True}, "last.pth")
    assert "`num_queries`: checkpoint 300, run 100; `two_stage`: checkpoint False, run True" in str(
        caught.value
    )
    assert "nheads" not in str(caught.value)
