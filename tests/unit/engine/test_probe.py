"""The largest step before the run: what it is, that nothing shows afterwards, and its memory."""

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_convert

from datasets.dataset import CocoDetection
from datasets.index import CocoIndex
from datasets.transforms import EvalTransform
from engine import probe as module
from engine.guards.guard import MemoryGuard, out_of_memory
from engine.probe import peak_memory, random_batch, total_memory, try_largest_step
from engine.trainer import Trainer
from util.batch import Batch

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PEAK = """
import sys, torch
from engine.probe import peak_memory
before = peak_memory(torch.device("cpu"))
block = torch.ones(int(sys.argv[1]), dtype=torch.uint8)
del block
print(before, peak_memory(torch.device("cpu")))
"""


@pytest.mark.long
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


def test_process_memory_is_within_the_machines() -> None:
    assert 0 < peak_memory(CPU) < total_memory(CPU)


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 30), st.integers(1, 3))
def test_the_batch_has_the_given_size(
    shape: tuple[int, int], num_boxes: int, batch_size: int
) -> None:
    batch = random_batch(batch_size, shape, num_boxes)
    assert batch.images is not None
    assert batch.images.images.shape == (batch_size, 3, *shape)
    assert not batch.images.mask.any()
    assert batch.images.sizes == (shape,) * batch_size
    assert len(batch.targets) == batch_size
    for target in batch.targets:
        assert set(target) == {"image_id", "labels", "boxes", "orig_size", "size"}
        assert target["labels"].tolist() == [0] * num_boxes
        assert target["size"].tolist() == target["orig_size"].tolist() == list(shape)
        corners = box_convert(target["boxes"], "cxcywh", "xyxy")
        assert corners.shape == (num_boxes, 4)
        assert bool(((corners > -1e-6) & (corners < 1 + 1e-6)).all())
        assert bool((corners[:, 2:] > corners[:, :2]).all())


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


Content = dict[str, Any]
Write = Callable[[Content], tuple[Path, Path]]


class Untrained:
    """As much of a trainer as the probe asks for when its step is another one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.detector = device, torch.nn.Linear(2**27, 1, device="meta")


@pytest.fixture
def dataset(content: Content, write: Write) -> CocoDetection:
    """Return images of 40 x 30 pixels, whose short side becomes 60, and one of 30 x 50."""
    content["images"] += [{"id": 99, "file_name": "99.png", "width": 30, "height": 50}]
    json_path, folder = write(content)
    Image.new("RGB", (30, 50)).save(folder / "99.png")
    index = CocoIndex.load(json_path, folder, need_boxes=True)
    transform = EvalTransform(eval_scale=60, max_size=500, mean=(0,) * 3, std=(1,) * 3)
    return CocoDetection(index, transform)


@pytest.mark.parametrize(("batch_size", "shape"), [(2, (100, 80)), (1, (100, 60))])
def test_the_largest_shape_of_the_data_is_tried_and_reported(
    dataset: CocoDetection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batch_size: int,
    shape: tuple[int, int],
) -> None:
    tried: list[Batch] = []
    monkeypatch.setattr(module, "try_step", lambda _, batch: tried.append(batch))
    monkeypatch.setattr(module, "peak_memory", lambda _: 2**30)
    monkeypatch.setattr(module, "total_memory", lambda _: 47 * 2**29)
    trainer = cast(Trainer, Untrained(CPU))
    try_largest_step(trainer, dataset, batch_size)
    ((images, targets),) = [(batch.images, batch.targets) for batch in tried]
    assert images is not None
    boxes = int(dataset.index.boxes_per_image.max())
    assert images.images.shape == (batch_size, 3, *shape)
    assert [len(target["labels"]) for target in targets] == [boxes] * batch_size
    head = f"largest step: {batch_size} x {shape[0]} x {shape[1]}, {boxes} boxes: peak"
    # with the two moments of 2**27 weights and a bias
    assert re.fullmatch(rf"{head} 2\.0 GiB of 23\.5 GiB, 0\.\d s\n", capsys.readouterr().out)
    monkeypatch.setattr(module, "peak_memory", lambda _: 0)
    monkeypatch.setattr(module, "total_memory", lambda _: 0)
    try_largest_step(trainer, dataset, batch_size)
    assert re.fullmatch(rf"{head} 0\.0 GiB, 0\.\d s\n", capsys.readouterr().out)


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_the_generators_alone(
    dataset: CocoDetection, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def step(trainer: Trainer, batch: Batch) -> None:
        draws()
        if fails:
            raise MemoryError

    def seed() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    monkeypatch.setattr(module, "try_step", step)
    seed()
    expected = draws()
    seed()
    if fails:
        with pytest.raises(MemoryError):
            try_largest_step(cast(Trainer, Untrained(CPU)), dataset, 1)
    else:
        try_largest_step(cast(Trainer, Untrained(CPU)), dataset, 1)
    assert draws() == expected


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_gpu_is_probed_and_its_errors_are_recognised(
    dataset: CocoDetection, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")

    def step(trainer: Trainer, batch: Batch) -> None:
        torch.empty(2**28, dtype=torch.uint8, device=device)

    monkeypatch.setattr(module, "try_step", step)
    try_largest_step(cast(Trainer, Untrained(device)), dataset, 2)
    assert 2**28 <= peak_memory(device) < total_memory(device)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45, dtype=torch.uint8, device=device)
    assert out_of_memory(caught.value)
    advice = MemoryGuard(1).on_error(caught.value, [random_batch(1, (8, 8), 1)])
    assert "GiB more were needed" in str(advice)
