"""Clocks and meters: what is timed, and the stages of an image against the detector's own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from configs.schema import DataConfig
from datasets.build import build_transform
from datasets.dataset import ImageList
from engine.benchmark.measure import Times, time_in_turn
from engine.benchmark.stages import STAGES, decode, generated_image, prepare, time_stages
from models.build import build_model
from models.postprocess import PostProcess
from tests.unit.models.small import small_config

ROOT = Path(__file__).resolve().parents[4]
CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def test_median_and_percentile() -> None:
    times = Times(tuple(i / 100 for i in range(101)))
    assert times.median == 0.5
    assert times.p95 == pytest.approx(0.95)
    assert Times((0.3,)).p95 == 0.3


def test_calls_take_turns_and_the_first_rounds_do_not_count() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    fast, slept = time_in_turn([lambda: order.append("fast"), slow], runs=3, warm_up=2, device=CPU)
    assert order == ["fast", "slow"] * 5
    assert len(fast.seconds) == len(slept.seconds) == 3
    assert min(slept.seconds) >= 0.02


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_call_alone() -> None:
    """In a process of its own: the heap of one that has worked may hold as much already."""
    code = """
import numpy, torch
from engine.benchmark.measure import peak_during
for size in (1, 2**28, 1):
    print(peak_during(lambda: numpy.ones(size, dtype=numpy.uint8), torch.device("cpu")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    small, large, again = map(int, done.stdout.split())
    assert large - small == pytest.approx(2**28, rel=0.1)
    assert again < large - 2**27


def test_an_image_is_prepared_as_the_detector_does(tmp_path: Path) -> None:
    path = generated_image(tmp_path)
    transform = build_transform(
        DataConfig(eval_scale=64, max_size=96), train=False, mean=MEAN, std=STD
    )
    item = ImageList([path], transform)[0]
    assert isinstance(item, tuple)
    batch = prepare([decode(path)], (64, 85), MEAN, STD)
    assert batch.images[0].equal(item[0])
    assert not batch.mask.any()


def test_every_stage_is_timed_for_every_run(tmp_path: Path) -> None:
    model = build_model(small_config(), num_classes=3).eval()
    started = time.perf_counter()
    times = time_stages(
        model, PostProcess(), [generated_image(tmp_path)], (64, 96), mean=MEAN, std=STD,
        device=CPU, runs=3, warm_up=1,
    )  # fmt: skip
    spent = time.perf_counter() - started
    assert tuple(times) == STAGES
    seconds = [second for stage in times.values() for second in stage.seconds]
    assert len(seconds) == 3 * len(STAGES)
    assert min(seconds) > 0
    assert sum(seconds) < spent
