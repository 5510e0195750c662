"""The real command line in a process of its own, on a small generated data set."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets.shapes import generate_shapes

ROOT = Path(__file__).resolve().parents[2]
TINY = str(Path(__file__).with_name("tiny.yaml"))

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def run_cli(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run `python main.py ARGUMENTS` and capture what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run the command line."""
    return run_cli


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data set of 16 training and 7 validation images."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(folder, num_train=16, num_val=7, seed=0)
    return folder


@pytest.fixture(scope="session")
def finished_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = run_cli("train", "--config", TINY, "--coco_path", shapes, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def reference_options(shapes: Path) -> tuple[str | Path, ...]:
    """The options of a run that has all kinds of state, and saves after every step."""
    return ("--coco_path", shapes, "--epochs", "3", "--dropout", "0.1", "--ema_decay", "0.9",
            "--save_every", "1", "--keep_checkpoints", "3")  # fmt: skip


@pytest.fixture(scope="session")
def reference(
    reference_options: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of such a run that nothing interrupted: 12 steps."""
    from tests.integration.runs import Command

    folder = tmp_path_factory.mktemp("runs") / "reference"
    Command(folder, reference_options).run()
    return folder


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log.txt."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
