"""Out of memory: recognised from the real thing, told with what helps, and probed beforehand."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_convert

from engine.guards.memory import (
    Probe,
    memory_advice,
    out_of_memory,
    peak_memory,
    probe,
    total_memory,
)
from util.batch import PaddedBatch, Target
from util.errors import UserError

ROOT = Path(__file__).parents[4]
CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GIB = 2**30


def cpu_failure() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)  # a million GiB
    return caught.value


def test_the_allocators_own_errors_are_recognised() -> None:
    assert out_of_memory(cpu_failure())
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(MemoryError) as caught:
        bytearray(2**60)
    assert out_of_memory(caught.value)


def test_other_errors_are_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(caught.value)
    assert not out_of_memory(ValueError("out of memory"))


def test_the_advice_names_shapes_boxes_and_options() -> None:
    advice = memory_advice(
        cpu_failure(), images_shape=(4, 3, 800, 1333), boxes=93, micro_batch=4, accumulation=8
    )
    assert isinstance(advice, UserError)
    message = str(advice)
    for words in (
        "4 x 800 x 1333", "93 boxes", "(1048576.0 GiB more", "`batch_size 2` with the same "
        "`effective_batch_size`", "4 x 8", "`activation_checkpointing`", "`precision bf16`",
        "`train_scales`", "`max_size`",
    ):  # fmt: skip
        assert words in message
    assert "\n" not in message


def test_the_advice_for_one_image_names_no_smaller_batch() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a")
    message = str(
        memory_advice(error, images_shape=(1, 3, 64, 96), boxes=0, micro_batch=1, accumulation=1)
    )
    assert "2.50 GiB more" in message
    assert "batch_size" not in message
    message = str(
        memory_advice(
            MemoryError(), images_shape=(1, 3, 64, 96), boxes=0, micro_batch=1, accumulation=1
        )
    )
    assert "boxes an image. Try `activation_checkpointing" in message


PEAK = """
import sys, torch
from engine.guards.memory import peak_memory
before = peak_memory(torch.device("cpu"))
block = torch.ones(int(sys.argv[1]), dtype=torch.uint8)
del block
print(before, peak_memory(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak is not known there")
def test_the_peak_of_a_process_holds_what_was_freed() -> None:
    size = 300 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(size)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert 10 * 2**20 < before < after
    assert 0.7 * size < after - before < 1.2 * size  # some of what was held before is free again


def test_what_a_process_holds_is_within_the_machine() -> None:
    assert 0 < peak_memory(CPU) < total_memory(CPU)


def test_a_probe_in_words() -> None:
    line = Probe(2, (1333, 1000), 93, int(7.1 * GIB), int(23.5 * GIB), 8.21).line()
    assert line == "largest step: 2 x 1333 x 1000, 93 boxes: peak 7.1 GiB of 23.5 GiB, 8.2 s"
    assert Probe(1, (64, 64), 0, GIB, 0, 0.5).line().endswith("0 boxes: peak 1.0 GiB, 0.5 s")


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 30), st.integers(1, 3))
def test_a_probe_runs_one_batch_of_the_given_size(
    shape: tuple[int, int], num_boxes: int, batch_size: int
) -> None:
    seen: list[tuple[PaddedBatch, list[Target]]] = []
    result = probe(lambda *batch: seen.append(batch), CPU, shape, num_boxes, batch_size)
    ((images, targets),) = seen
    assert images.images.shape == (batch_size, 3, *shape)
    assert not images.mask.any()
    assert images.sizes == (shape,) * batch_size
    assert len(targets) == batch_size
    for target in targets:
        assert set(target) == {"image_id", "labels", "boxes", "orig_size", "size"}
        assert target["labels"].tolist() == [0] * num_boxes
        assert target["size"].tolist() == target["orig_size"].tolist() == list(shape)
        corners = box_convert(target["boxes"], "cxcywh", "xyxy")
        assert corners.shape == (num_boxes, 4)
        assert bool(((corners > -1e-6) & (corners < 1 + 1e-6)).all())
        assert bool((corners[:, 2:] > corners[:, :2]).all())
    assert (result.batch_size, result.shape, result.num_boxes) == (batch_size, shape, num_boxes)
    assert 0 < result.peak < result.total
    assert result.seconds < 5


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_the_generators_alone(fails: bool) -> None:
    def step(images: PaddedBatch, targets: list[Target]) -> None:
        draws()
        if fails:
            raise MemoryError

    def seed() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    seed()
    expected = draws()
    seed()
    if fails:
        with pytest.raises(MemoryError):
            probe(step, CPU, (8, 8), 2, 1)
    else:
        probe(step, CPU, (8, 8), 2, 1)
    assert draws() == expected


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_gpu_is_probed_and_its_errors_are_recognised() -> None:
    device = torch.device("cuda")

    def step(images: PaddedBatch, targets: list[Target]) -> None:
        assert images.images.is_cuda
        torch.empty(2**28, dtype=torch.uint8, device=device)

    result = probe(step, device, (32, 32), 3, 2)
    assert 2**28 <= result.peak < result.total
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45, dtype=torch.uint8, device=device)
    assert out_of_memory(caught.value)
    advice = memory_advice(
        caught.value, images_shape=(1, 3, 8, 8), boxes=1, micro_batch=1, accumulation=1
    )
    assert "GiB more were needed" in str(advice)
