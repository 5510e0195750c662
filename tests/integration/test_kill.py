"""A run that is killed or asked to stop, again and again, ends as if nothing had happened."""

import os
import random
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from datasets.shapes import generate_shapes
from models.deformable_detr import DeformableDETR
from tests.integration.conftest import TINY
from tests.integration.runs import (
    Command,
    Running,
    alive,
    assert_same_runs,
    metrics,
    start,
    state_of,
)

Options = tuple[str | Path, ...]
EVALUATES = ": data "  # of the line that sums up an epoch's steps, before its evaluation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes in /proc")


def saved_step(folder: Path) -> int:
    """Return the steps that the newest checkpoint has behind it; 0 without one."""
    last = folder / "last.pth"
    return int(state_of(last)["progress"]["step"]) if last.exists() else 0


def kill_after(running: Running, folder: Path, step: int, pause: float) -> None:
    """Kill a run a moment after a step."""
    running.wait_until(lambda: len(metrics(folder)) >= step)
    time.sleep(pause)
    running.kill()


def kill_in_a_save(command: Command) -> bool:
    """Kill a run when a checkpoint begins to be written; return whether it was half written."""
    running = command.start("--resume", "auto")
    half = command.folder / f".last.pth.{running.pid}.tmp"
    running.wait_until(half.exists, pause=0.001)
    running.kill()
    return half.exists()


def test_sigkill_at_any_moment(reference: Path, reference_options: Options, tmp_path: Path) -> None:
    random.seed(4)
    folder = tmp_path / "run"
    command = Command(folder, reference_options)
    again = ("--resume", "auto")
    command.start(*again).kill()  # before it has a folder
    first = command.start(*again, "--num_workers", "1")
    kill_after(first, folder, 1, random.random() / 5)
    while not kill_in_a_save(command):
        assert saved_step(folder) < 12, "no save was caught half written"
    second = command.start(*again)
    second.wait_until(lambda: EVALUATES in second.output)
    second.kill()
    third = command.start(*again, "--num_workers", "1")
    kill_after(third, folder, saved_step(folder) + 2, random.random() / 5)
    command.run(*again)
    assert_same_runs(folder, reference)
    assert [line["step"] for line in metrics(folder)] == list(range(12))
    assert not list(folder.glob(".*.tmp"))


def send_after_a_step(number: int) -> None:
    """Let a process send itself a signal after its first step."""

    def send(*_: Any) -> None:
        handle.remove()
        os.kill(os.getpid(), number)

    handle = register_optimizer_step_post_hook(send)


def send_while_it_evaluates(number: int) -> None:
    """Let a process send itself a signal at the first batch of an evaluation."""

    def send(module: nn.Module, _: Any) -> None:
        if isinstance(module, DeformableDETR) and not module.training:
            handle.remove()
            os.kill(os.getpid(), number)

    handle = register_module_forward_pre_hook(send)


@pytest.mark.slow
def test_a_stopped_run_saves_the_step_and_returns_the_signals_exit_code(
    reference: Path, reference_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # no saves but those of the epochs: what is saved is due to the signal
    command = Command(folder, (*reference_options, "--save_every", "0", "--resume", "auto"))
    moments = ((signal.SIGHUP, 129, send_after_a_step), (signal.SIGUSR1, 138, send_after_a_step),
               (signal.SIGTERM, 143, send_while_it_evaluates))  # fmt: skip
    for number, code, send in moments:
        output = command.run(code=code, prepare=partial(send, number))
        assert f"stopped at step {saved_step(folder)}" in output
        assert "Traceback" not in output
        assert len(metrics(folder)) == saved_step(folder)
    command.run()
    assert_same_runs(folder, reference)


def test_ctrl_c_in_a_terminal_reaches_the_loaders_too(
    reference: Path, reference_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = Command(folder, (*reference_options, "--num_workers", "1"))
    running = command.start()
    running.wait_until(lambda: bool(metrics(folder)))
    os.killpg(running.pid, signal.SIGINT)
    assert running.end() == 130, running.output
    assert "--resume" in running.output
    assert "Traceback" not in running.output
    command.run("--resume", "auto")
    assert_same_runs(folder, reference)


@pytest.mark.slow
def test_two_processes_killed_and_stopped(reference_options: Options, tmp_path: Path) -> None:
    options = (*reference_options, "--gpus", "2", "--device", "cpu", "--batch_size", "2",
               "--resume", "auto")  # fmt: skip
    whole = Command(tmp_path / "whole", options)
    uninterrupted = whole.start()
    folder = tmp_path / "run"
    command = Command(folder, options)

    first = command.start()
    first.wait_until((folder / "last.pth").exists)
    ranks = first.children
    assert len(ranks) == 2
    first.kill()  # the launcher: its processes must not train on beside the next run
    end = time.monotonic() + 10
    while any(alive(rank) for rank in ranks):
        assert time.monotonic() < end, "a process outlived its launcher"
        time.sleep(0.1)

    stopped = command.start()
    before = saved_step(folder)
    stopped.wait_until(lambda: "resuming" in stopped.output and len(metrics(folder)) > before)
    os.kill(stopped.children[1], signal.SIGTERM)  # to one rank of two: all stop
    assert stopped.end() == 143, stopped.output
    assert saved_step(folder) == len(metrics(folder)) < 12
    assert "Traceback" not in stopped.output

    third = command.start()
    kill_after(third, folder, saved_step(folder) + 1, 0.1)
    assert uninterrupted.end() == 0, uninterrupted.output
    command.run()
    assert_same_runs(folder, whole.folder)
    states = torch.load(folder / "last.pth", weights_only=True)["progress"]["rng"]
    assert not states[0]["torch"].equal(states[1]["torch"])  # the ranks drop out differently


def be_a_rank(rank: int, port: int) -> None:
    """Be one of two processes; the main one gets a signal as it draws the curves of an epoch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    sent: list[int] = []

    def send(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and ".curves.png." in str(arguments[0]) and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    if rank == 0:
        sys.addaudithook(send)


@pytest.mark.slow
def test_a_signal_to_one_process_between_epochs_stops_both(shapes: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ("--config", TINY, "--coco_path", shapes, "--output_dir", tmp_path / "run",
               "--device", "cpu", "--batch_size", "2", "--num_images", "0")  # fmt: skip
    tasks = [
        start(tmp_path / f"{rank}.txt", "train", *options, prepare=partial(be_a_rank, rank, port))
        for rank in range(2)
    ]
    assert [task.end() for task in tasks] == [143, 143], [task.output for task in tasks]
    assert len(metrics(tmp_path / "run")) == 4
    assert "SIGTERM: stopped at step 4" in tasks[0].output
    assert "lost another process" not in tasks[1].output


@pytest.mark.slow
def test_a_signal_to_one_process_in_an_evaluation_stops_both(tmp_path: Path) -> None:
    generate_shapes(tmp_path / "data", num_train=4, num_val=600, seed=0)
    folder = tmp_path / "run"
    options = ("--coco_path", tmp_path / "data", "--gpus", "2", "--device", "cpu")
    running = Command(folder, options).start("--batch_size", "2")
    running.wait_until(lambda: EVALUATES in running.output)
    os.kill(running.children[1], signal.SIGTERM)
    assert running.end() == 143, running.output
    assert "SIGTERM: stopped at step 1" in running.output  # the main process, which had no signal
    assert "Traceback" not in running.output
    assert state_of(folder / "last.pth")["progress"]["unevaluated"]
