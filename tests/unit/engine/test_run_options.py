"""What a run's own options are when it goes on from a checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.load import Given
from configs.schema import RunConfig
from engine.checkpoint import KEYS
from engine.commands.train import processes


def test_device_processes_and_determinism_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    run: dict[str, Any] = {"device": "cpu", "gpus": 2, "deterministic": True}
    run["output_dir"] = str(tmp_path)
    content = {**dict.fromkeys(KEYS, 0), "config": asdict(Given({"run": run}).config())}
    torch.save(content, tmp_path / "last.pth")
    resumed = processes(Given({"run": {"resume": str(tmp_path / "last.pth"), "gpus": 1}}))
    assert resumed == RunConfig(**{**run, "gpus": 1, "resume": str(tmp_path / "last.pth")})
    moved = (tmp_path / "last.pth").rename(tmp_path.with_name("moved.pth"))
    assert processes(Given({"run": {"resume": str(moved)}})).output_dir == str(moved.parent)


def test_without_a_checkpoint_they_are_those_given() -> None:
    given = Given({"run": {"resume": "auto", "gpus": 3}})
    assert processes(given) == RunConfig(resume="auto", gpus=3)
