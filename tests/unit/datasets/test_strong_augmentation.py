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
from datasets.shapes import generate_shapes
from datasets.split import BatchSplit
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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_that_are_under_way_follow_a_new_end_of_mixing(
    content: dict[str, Any], write: Write, num_workers: int
) -> None:
    plain = {"scale_jitter": (), "zoom_out": 0.0}
    dataset = strong(content, write, mosaic=0.0, mixup=1.0, close_augment_epochs=0, **plain)
    loader = TrainLoader(dataset, BatchSplit(3), num_workers=num_workers, seed=0)

    def boxes(epoch: int) -> list[int]:
        loader.set_epoch(epoch)
        return [len(target["boxes"]) for batch in loader for target in batch.targets]

    assert boxes(2) == [2, 2, 2]
    loader.mix_until(4)
    assert boxes(3) == [2, 2, 2]
    assert boxes(4) == [1, 1, 1]


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


def test_a_dense_run_has_its_phases(
    content: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    content["annotations"] = [a | {"bbox": [4, 6, 12, 12]} for a in content["annotations"]]
    only = {"mosaic": 0.0, "mixup": 0.0, "copy_blend": 1.0, "zoom_out": 0.0, "random_crop": False}
    dataset = strong(content, write, augment="dense", close_augment_epochs=3, **only)
    assert "augment_phases: replaces `close_augment_epochs`" in capsys.readouterr().out
    counts = []
    for epoch in (0, 1, 18, 19):  # of 20; the shares are 0.07 and 0.93
        dataset.set_epoch(epoch)
        items = [dataset[i] for i in range(len(dataset))]
        counts.append([len(item[1]["boxes"]) for item in items if isinstance(item, tuple)])
    assert counts == [[1] * 3, [4] * 3, [4] * 3, [1] * 3]


def digests(loader: TrainLoader, first_step: int = 0) -> list[tuple[int, bytes, bytes]]:
    """Return (image id, pixels, boxes) of every image of epoch 4, in order."""
    loader.set_epoch(4, first_step)
    seen = []
    for batch in loader:
        assert batch.images is not None
        for image, target in zip(batch.images.images, batch.targets, strict=True):
            height, width = target["size"].tolist()
            pixels = image[:, :height, :width].contiguous().numpy().tobytes()
            seen.append((int(target["image_id"]), pixels, target["boxes"].numpy().tobytes()))
    return seen


@pytest.mark.long
@pytest.mark.parametrize("augment", ["dense", "lsj"])
def test_batches_processes_and_resumption_change_no_image(augment: str, tmp_path: Path) -> None:
    generate_shapes(tmp_path / "data", num_train=12, num_val=1, seed=0)
    data = Given(
        {"data": {"augment": augment, "coco_path": str(tmp_path / "data"),
                  "train_scales": (48, 64), **({"fixed_size": 96} if augment == "lsj" else {})}}
    ).config().data  # fmt: skip
    index = load_index(data, "train")

    def loader(batch_size: int, num_workers: int) -> TrainLoader:
        dataset = build_dataset(data, index, train=True, mean=MEAN, std=STD, seed=3, epochs=12)
        return TrainLoader(dataset, BatchSplit(batch_size), num_workers=num_workers, seed=0)

    whole = digests(loader(1, 0))
    assert len(whole) == 12
    for batch_size, num_workers in ((3, 0), (4, 2)):
        assert sorted(digests(loader(batch_size, num_workers))) == sorted(whole)
    resumed = loader(3, 0)
    assert digests(resumed, 2) == digests(loader(3, 0))[6:]
