"""Decoded images kept in shared memory: the same pixels, within the bound, in all processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import DataConfig
from datasets.build import build_dataset, load_index
from datasets.dataset import ImageCache
from datasets.loader import TrainLoader
from datasets.split import BatchSplit
from util.errors import ConfigError

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def test_images_come_back_until_the_memory_is_full() -> None:
    cache = ImageCache(4, 1000)
    images = [torch.randint(0, 256, (3, 8, 9 + i), dtype=torch.uint8) for i in range(4)]
    for position in (2, 0, 2, 3, 1):
        cache.put(position, images[position], (80, 90))
    kept = [position for position in range(4) if cache.get(position) is not None]
    assert kept == [0, 2, 3]  # 264 + 216 + 288 bytes; 240 more would pass the bound
    for position in kept:
        found = cache.get(position)
        assert found is not None
        assert torch.equal(found[0], images[position])
        assert found[1] == (80, 90)


def test_a_cache_larger_than_memory_is_a_one_line_error() -> None:
    with pytest.raises(ConfigError, match="^cache_images: there are not .* GB"):
        ImageCache(1, 10**15)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_from_the_cache_are_those_from_the_files(
    num_workers: int,
    content: dict[str, Any],
    write: Callable[[dict[str, Any]], tuple[Path, Path]],
) -> None:
    json_path, folder = write(content)
    cfg = DataConfig(
        train_images=str(folder),
        train_annotations=str(json_path),
        train_scales=(24, 36),
        max_size=90,
        cache_images=0.001,
    )
    index = load_index(cfg, "train")
    dataset = build_dataset(cfg, index, train=True, mean=MEAN, std=STD)
    loader = TrainLoader(dataset, BatchSplit(1), num_workers=num_workers, seed=0)

    def epoch(number: int) -> list[torch.Tensor]:
        loader.set_epoch(number)
        return [batch.images.images for batch in loader if batch.images is not None]

    first = epoch(1)
    for path in folder.iterdir():  # what is not in the cache now would come out black
        Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(path)
    again = epoch(1)
    assert len(first) == len(again) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
