"""Batches: collation, reproducible order, and evaluation that sees every picture once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from datasets.coco import CocoDetection, CocoIndex
from datasets.loader import (
    AspectRatioBatchSampler,
    SameSizeBatchSampler,
    ShuffledBatchSampler,
    collate,
    eval_loader,
    train_loader,
)
from datasets.transforms import EvalTransform, TrainTransform
from util.batch import Batch, Target, UnreadableImage

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
RANDOM = TrainTransform(
    train_scales=tuple(range(16, 33)),
    max_size=60,
    hflip=0.5,
    random_crop=True,
    crop_scales=(24, 32),
    crop_size=(16, 24),
    one_scale_per_batch=False,
    mean=MEAN,
    std=STD,
)

Content = dict[str, Any]
Write = Callable[[Content], tuple[Path, Path]]
sizes = st.lists(st.sampled_from([(30, 40), (40, 30), (20, 20), (0, 0)]), min_size=1, max_size=60)


def item(image_id: int, height: int, width: int) -> tuple[Tensor, Target]:
    """Return a picture of ones with an empty target."""
    return torch.ones(3, height, width), {"image_id": torch.tensor(image_id)}


def test_collate_pads_and_sets_unreadable_pictures_apart() -> None:
    bad = UnreadableImage(7, "x.png", "gone")
    batch = collate([item(1, 4, 6), bad, item(2, 5, 3)])
    assert batch.images is not None
    assert batch.images.images.shape == (2, 3, 5, 6)
    assert batch.images.sizes == ((4, 6), (5, 3))
    assert (batch.images.images.sum((1, 2, 3)) == torch.tensor([72.0, 45.0])).all()
    assert (~batch.images.mask).sum((1, 2)).tolist() == [24, 15]
    assert [int(t["image_id"]) for t in batch.targets] == [1, 2]
    assert batch.unreadable == [bad]
    assert collate([bad]) == Batch(None, [], [bad])


@given(st.integers(1, 50), st.integers(1, 8), st.integers(1, 3), st.integers(0, 5))
def test_shuffled_batches_are_full_equal_in_number_and_disjoint(
    count: int, batch_size: int, world_size: int, epoch: int
) -> None:
    ranks = []
    for rank in range(world_size):
        sampler = ShuffledBatchSampler(
            count, batch_size=batch_size, seed=3, rank=rank, world_size=world_size
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    assert len({len(batches) for batches in ranks}) == 1
    seen = [i for batches in ranks for batch in batches for i in batch]
    if count >= batch_size * world_size:
        assert all(len(batch) == batch_size for batches in ranks for batch in batches)
        assert len(set(seen)) == len(seen) > count - batch_size * world_size
    else:
        assert set(seen) == set(range(count))
        assert len({len(batches[0]) for batches in ranks}) == 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = ShuffledBatchSampler(40, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert len({str(order(*key)) for key in [(1, 2), (1, 3), (2, 2)]}) == 3


@given(sizes, st.integers(1, 6), st.integers(1, 3))
def test_aspect_ratio_batches_do_not_mix(
    sizes: list[tuple[int, int]], batch_size: int, world_size: int
) -> None:
    ranks = [
        AspectRatioBatchSampler(
            sizes, batch_size=batch_size, seed=0, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    assert len(ranks[0]) >= 1
    step_size = batch_size * world_size
    portrait = [height > width for height, width in sizes]
    apart = min(portrait.count(True), portrait.count(False)) >= step_size
    for step in zip(*batches, strict=True):
        together = [i for batch in step for i in batch]
        if len(sizes) >= step_size:
            assert len(set(together)) == len(together) == step_size
        else:
            assert set(together) == set(range(len(sizes)))
        if apart:
            assert len({portrait[i] for i in together}) == 1


def test_the_few_pictures_of_the_other_orientation_are_seen_too() -> None:
    sampler = AspectRatioBatchSampler([(1, 2)] * 20 + [(2, 1)] * 3, batch_size=4, seed=0)
    seen: set[int] = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        seen |= {i for batch in sampler for i in batch}
    assert seen == set(range(23))


@given(sizes, st.integers(1, 7), st.integers(1, 3))
def test_same_size_batches_hold_every_picture_once(
    sizes: list[tuple[int, int]], batch_size: int, world_size: int
) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in SameSizeBatchSampler(
            sizes, batch_size=batch_size, rank=rank, world_size=world_size
        )
    ]
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
    assert all(len(batch) <= batch_size for batch in batches)


def test_large_pictures_are_evaluated_first() -> None:
    sampler = SameSizeBatchSampler([(10, 10), (30, 40), (20, 20)], batch_size=2)
    assert list(sampler) == [[1], [2], [0]]


@pytest.fixture
def index(content: Content, write: Write) -> CocoIndex:
    """Return twelve pictures, the last one unreadable."""
    content["images"] += [
        {"id": 100 + i, "file_name": f"{100 + i}.png", "width": 40, "height": 30} for i in range(9)
    ]
    json_path, folder = write(content)
    (folder / "108.png").write_text("no picture")
    return CocoIndex.load(json_path, folder, need_boxes=True)


def digest(batch: Batch) -> tuple[list[int], float]:
    """Return what a batch shows, in a form to compare."""
    ids = [int(target["image_id"]) for target in batch.targets]
    return ids, 0.0 if batch.images is None else float(batch.images.images.double().sum())


def test_training_is_the_same_with_and_without_workers(index: CocoIndex) -> None:
    epochs = {}
    for num_workers in (0, 2):
        loader = train_loader(
            CocoDetection(index, RANDOM, seed=5), batch_size=5, num_workers=num_workers, seed=5
        )
        assert len(loader) == 2
        runs = []
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            runs.append([digest(batch) for batch in loader])
        assert runs[0] == runs[2] != runs[1]
        epochs[num_workers] = runs
    assert epochs[0] == epochs[2]


def test_one_scale_for_a_batch_pads_nothing(index: CocoIndex) -> None:
    (index.image_dir / "108.png").write_bytes((index.image_dir / "107.png").read_bytes())
    shared = replace(RANDOM, random_crop=False, one_scale_per_batch=True)
    dataset = CocoDetection(index, shared, seed=2)
    loader = train_loader(dataset, batch_size=3, num_workers=0, seed=2)
    by_epoch = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        batches = [batch.images for batch in loader]
        for images, batch in zip(batches, loader, strict=True):
            same = len({tuple(t["orig_size"].tolist()) for t in batch.targets}) == 1
            assert images is not None
            assert not (same and images.mask.any())
        by_epoch.append([images.sizes[0] for images in batches if images is not None])
    assert len({str(sizes) for sizes in by_epoch}) > 1  # drawn anew in every epoch
    assert any(len(set(sizes)) > 1 for sizes in by_epoch)  # and for every batch
    loader.set_epoch(4, first_batch=2)
    resumed = [batch.images.sizes[0] for batch in loader if batch.images is not None]
    assert resumed == by_epoch[4][2:]


def test_resumed_epoch_goes_on_where_it_stopped(index: CocoIndex) -> None:
    loader = train_loader(CocoDetection(index, RANDOM), batch_size=3, num_workers=0, seed=0)
    loader.set_epoch(4)
    whole = [digest(batch) for batch in loader]
    loader.set_epoch(4, first_batch=3)
    assert [digest(batch) for batch in loader] == whole[3:]
    loader.set_epoch(4)
    assert [digest(batch) for batch in loader] == whole


def test_loading_leaves_the_global_random_numbers_alone(index: CocoIndex) -> None:
    loader = train_loader(CocoDetection(index, RANDOM), batch_size=4, num_workers=0, seed=0)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_data_smaller_than_a_batch_is_one_batch(index: CocoIndex) -> None:
    loader = train_loader(
        CocoDetection(index, RANDOM),
        batch_size=50,
        num_workers=0,
        seed=0,
        aspect_ratio_grouping=True,
    )
    (batch,) = loader
    assert len(batch.targets) + len(batch.unreadable) == 12


@pytest.mark.parametrize("batch_size", [1, 5])
def test_evaluation_sees_every_picture_once_without_padding(
    index: CocoIndex, batch_size: int
) -> None:
    dataset = CocoDetection(
        index, EvalTransform(eval_scale=32, max_size=60, mean=MEAN, std=STD), seed=0
    )
    ids: list[int] = []
    for batch in eval_loader(dataset, batch_size=batch_size, num_workers=0):
        ids += [int(target["image_id"]) for target in batch.targets]
        ids += [bad.image_id for bad in batch.unreadable]
        assert batch.images is None or not batch.images.mask.any()
    assert sorted(ids) == sorted(index.images.ids.tolist())
