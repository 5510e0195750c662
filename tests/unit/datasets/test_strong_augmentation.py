"""Strong augmentation of a data set: drawn from seed, epoch and image; mixed but at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import Given
from datasets.build import build_dataset, load_index
from datasets.dataset import CocoDetection
from datasets.loader import TrainLoader
from datasets.samplers import BatchSplit
from datasets.workers import loader_processes

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
Write = Callable[[dict[str, Any]], tuple[Path, Path]]


def strong(content: dict[str, Any], write: Write, **options: Any) -> CocoDetection:
    json_path, folder = write(content)
    given = {"train_images": str(folder), "train_annotations": str(json_path), **options}
    data = Given({"data": {"augment": "strong", "train_scales": (24, 36), **given}}).config().data
    index = load_index(data, "train")
    return build_dataset(data, index, train=True, mean=MEAN, std=STD, seed=3, epochs=20)


def test_mixed_images_do_not_depend_on_loader_processes(
    content: dict[str, Any], write: Write
) -> None:
    epochs = []
    for num_workers in (0, 2):
        dataset = strong(content, write, mosaic=0.5, mixup=1.0)
        loader = TrainLoader(dataset, BatchSplit(3), num_workers=num_workers, seed=0)
        loader.set_epoch(4)
        epochs.append(next(iter(loader)))
    first, second = (batch.images for batch in epochs)
    assert first is not None
    assert second is not None
    assert torch.equal(first.images, second.images)
    for a, b in zip(epochs[0].targets, epochs[1].targets, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])


def test_the_last_epochs_mix_nothing(content: dict[str, Any], write: Write) -> None:
    plain = {"scale_jitter": (), "zoom_out": 0.0}
    dataset = strong(content, write, mosaic=0.0, mixup=1.0, close_augment_epochs=5, **plain)

    def boxes(epoch: int) -> list[int]:
        dataset.set_epoch(epoch)
        items = [dataset[i] for i in range(len(dataset))]
        return [len(item[1]["boxes"]) for item in items if isinstance(item, tuple)]

    assert boxes(14) == [2, 2, 2]  # each image has one box, and so has its partner
    assert boxes(15) == [1, 1, 1]


def test_options_without_effect_are_reported(
    content: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    strong(content, write, close_augment_epochs=19)
    assert "notice" not in capsys.readouterr().out
    strong(content, write, close_augment_epochs=20)
    assert "notice: close_augment_epochs 20 covers all 20 epochs" in capsys.readouterr().out
    strong(content, write, augment="none", train_scales=(24, 36))
    assert "`train_scales` has no effect" in capsys.readouterr().out


def test_processes_follow_the_cores() -> None:
    assert loader_processes(0) == 0
    assert loader_processes(3) == 3
    assert 1 <= loader_processes(-1) <= 8
