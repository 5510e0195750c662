"""The real command line, on a small generated data set."""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.shapes import generate_shapes

ROOT = Path(__file__).resolve().parents[2]
TINY = str(Path(__file__).with_name("tiny.yaml"))

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


# What leaves marks on a process, or is read once in its life.
OWN_PROCESS = ("--gpus", "--deterministic", "--compile", "hf:")


def run_cli(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run `main.py ARGUMENTS` and capture what it prints.

    In this process, as importing PyTorch would take most of the time, unless it would leave marks.
    Real processes are what tests of interruptions, several processes and the package start.
    """
    words = [str(a) for a in arguments]
    marked = any(word.startswith(OWN_PROCESS) for word in words)
    return (run_process if marked or "MSDEFORM_BACKEND" in os.environ else run_here)(words)


def run_process(words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "main.py"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


def run_here(words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run the command line in this process; an exception prints its traceback, as Python does."""
    from main import main

    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    before = Path.cwd()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: int | str | None = main(words)
        except SystemExit as exit_:
            code = exit_.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    torch.set_num_threads(threads)
    os.chdir(before)
    return subprocess.CompletedProcess(words, int(code or 0), out.getvalue(), err.getvalue())


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
