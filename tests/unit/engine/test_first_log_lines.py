"""What a run says of itself before its first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets.dataset import CocoDetection
from datasets.index import CocoIndex
from datasets.loader import TrainLoader
from datasets.split import BatchSplit
from datasets.transforms import EvalTransform
from engine.build import _parts_of_step
from util.world import World


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (BatchSplit(2), "2 images = 2 at once x 1 micro-batch x 1 process with"),
        (BatchSplit(1, 2), "2 images = 1 at once x 2 micro-batches x 1 process with"),
        (BatchSplit(2, 2), "3 images (there are 3) = 2 at once x 2 micro-batches x 1 process with"),
        (
            BatchSplit(2, 1, 0, 2),
            "4 images (there are 3) = 2 at once x 1 micro-batch x 2 processes, each with",
        ),
    ],
)
def test_a_run_says_how_many_images_a_step_has(
    content: dict[str, Any], write: Callable[..., tuple[Path, Path]], split: BatchSplit, said: str
) -> None:
    index = CocoIndex.load(*write(content), need_boxes=False)
    data = CocoDetection(
        index, EvalTransform(eval_scale=32, max_size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    assert len(data) == 3
    loader = TrainLoader(data, split, num_workers=0, seed=0)
    world = World(split.rank, split.world_size)
    assert _parts_of_step(split, loader, world, 0, len(data)).startswith(said)
