"""What a run's own options are when it goes on from a checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig, build_config
from engine.checkpoint import KEYS
from engine.commands.train import run_options
from util.errors import ConfigError


def test_device_processes_and_determinism_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    run: dict[str, Any] = {"device": "cpu", "gpus": 2, "deterministic": True}
    run["output_dir"] = str(tmp_path)
    content = {**dict.fromkeys(KEYS, 0), "config": asdict(build_config({"run": run}))}
    torch.save(content, tmp_path / "last.pth")
    resumed = run_options({"run": {"resume": str(tmp_path / "last.pth"), "gpus": 1}})
    assert resumed == RunConfig(**{**run, "gpus": 1, "resume": str(tmp_path / "last.pth")})
    moved = (tmp_path / "last.pth").rename(tmp_path.with_name("moved.pth"))
    assert run_options({"run": {"resume": str(moved)}}).output_dir == str(moved.parent)


def test_without_a_checkpoint_they_are_those_given() -> None:
    assert run_options({"run": {"seed": 4, "gpus": 3}}) == RunConfig(seed=4, gpus=3)


def test_auto_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="--resume auto needs --output_dir"):
        run_options({"run": {"resume": "auto"}})
