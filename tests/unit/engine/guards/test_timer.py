"""Times of the parts of a step: they add up, wait for nothing, and are told once."""

import time

import pytest
import torch

from engine.guards.timer import StepTimer, shares

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_measured_parts_are_right_and_add_up() -> None:
    timer = StepTimer(torch.device("cpu"))
    started = time.perf_counter()
    for part, seconds in (
        ("data", 0.01), ("forward", 0.03), ("backward", 0.02), ("forward", 0.03), ("update", 0.0),
    ):  # fmt: skip
        time.sleep(seconds)
        timer.mark(part)
    timer.finish_step(3)
    elapsed = time.perf_counter() - started
    step = timer.take(3)
    assert list(step) == ["data", "forward", "backward", "update"]
    assert step["forward"] >= 0.06
    assert step["backward"] >= 0.02
    assert sum(step.values()) == pytest.approx(elapsed, abs=2e-3)
    with pytest.raises(KeyError):
        timer.take(3)


def test_a_step_starts_where_the_last_one_ended() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.mark("forward")
    timer.finish_step(0)
    time.sleep(0.02)  # before the first mark of the second step
    timer.mark("data")
    timer.finish_step(1)
    timer.mark("data")  # of a step that is not finished
    second, first = timer.take(1), timer.take(0)
    assert list(first) == ["forward"]
    assert second["data"] >= 0.02


def test_restart_forgets_what_ran_in_between() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.mark("forward")
    time.sleep(0.05)
    timer.restart()
    timer.mark("data")
    timer.finish_step(0)
    step = timer.take(0)
    assert list(step) == ["data"]
    assert step["data"] < 0.04


def test_shares_are_of_all_steps_together() -> None:
    totals = {"data": 0.2, "forward": 1.2, "update": 0.6}
    assert shares(totals) == "data 10 %, forward 60 %, update 30 %"
    assert shares({}) == shares({"data": 0.0}) == ""


@pytest.mark.gpu
@NEEDS_CUDA
def test_cuda_is_timed_on_the_device_without_waiting() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    timer = StepTimer(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):
            matrix = matrix @ matrix
        timer.mark("forward")
        timer.finish_step(0)
        assert timer.take(0) == {}  # the device is still at it
    finally:
        torch.cuda.set_sync_debug_mode("default")
    started = time.perf_counter()
    torch.cuda.synchronize()
    step = timer.take(0)
    assert step["forward"] >= time.perf_counter() - started > 0
