"""What a run's own options are when it goes on from a checkpoint."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from configs.load import Given
from configs.schema import RunConfig
from engine import api, plan
from engine.checkpoint import KEYS, load_checkpoint
from engine.plan import forget_saved_run, plan_run, processes, saved_run
from util.world import World

EMPTY: dict[str, Any] = {
    **{key: kind() for key, kind in KEYS.items()},
    "progress": {"step": 0},
    "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
}


def test_device_processes_and_determinism_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    run: dict[str, Any] = {"device": "cpu", "gpus": 2, "deterministic": True}
    run["output_dir"] = str(tmp_path)
    content = {**EMPTY, "config": asdict(Given({"run": run}).config())}
    torch.save(content, tmp_path / "last.pth")
    resumed = processes(Given({"run": {"resume": str(tmp_path / "last.pth"), "gpus": 1}}))
    assert resumed == RunConfig(**{**run, "gpus": 1, "resume": str(tmp_path / "last.pth")})
    moved = (tmp_path / "last.pth").rename(tmp_path.with_name("moved.pth"))
    assert processes(Given({"run": {"resume": str(moved)}})).output_dir == str(moved.parent)


def test_without_a_checkpoint_they_are_those_given() -> None:
    given = Given({"run": {"resume": "auto", "gpus": 3}})
    assert processes(given) == RunConfig(resume="auto", gpus=3)


def test_the_checkpoint_to_resume_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counting(path: Path) -> dict[str, Any]:
        read.append(path)
        return load_checkpoint(path)

    monkeypatch.setattr(plan, "load_checkpoint", counting)
    config = asdict(Given({"run": {"output_dir": str(tmp_path)}}).config())
    content = {**EMPTY, "config": config}
    path = tmp_path / "last.pth"
    torch.save(content, path)
    given = Given({"run": {"resume": str(path)}})
    for _ in range(2):  # the program asks for the number of processes, then the command runs
        options = processes(given)
    assert plan_run(given, options, World()).checkpoint == path
    saved_run(path)  # the state
    assert read == [path]
    torch.save({**content, "epoch": 1}, path)
    os.utime(path, ns=(0, 0))
    assert saved_run(path)["epoch"] == 1  # it has changed
    forget_saved_run()
    saved_run(path)
    assert read == [path] * 3


@pytest.mark.parametrize("entry", ["command line", "library"])
def test_a_launcher_does_not_keep_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    kept: list[int] = []

    def launch(*_: object, **__: object) -> int:
        kept.append(plan._read.cache_info().currsize)
        return 0

    monkeypatch.setattr("engine.processes.launch", launch)
    monkeypatch.setattr("engine.api.launch", launch)
    config = asdict(Given({"run": {"output_dir": str(tmp_path)}}).config())
    path = tmp_path / "last.pth"
    torch.save({**EMPTY, "config": config}, path)
    if entry == "library":
        api.train(resume=str(path), gpus=2, device="cpu")
    else:
        main.run(["train", "--resume", str(path), "--gpus", "2", "--device", "cpu"])
    assert kept == [0]
