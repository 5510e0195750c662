"""Batches: collation, reproducible order, and evaluation that sees every image once."""

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from datasets.build import split_batch
from datasets.collate import collate
from datasets.dataset import CocoDetection, SampleKey
from datasets.eval_loader import eval_loader, same_size_batches
from datasets.index import CocoIndex
from datasets.loader import TrainLoader, with_images
from datasets.samplers import ShuffledBatchSampler
from datasets.split import BatchSplit
from datasets.transforms import EvalTransform, TrainTransform
from util.batch import Batch, Target, UnreadableImage, pad_images
from util.errors import ConfigError

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
    """Return an image of ones with an empty target."""
    return torch.ones(3, height, width), {"image_id": torch.tensor(image_id)}


def test_collate_pads_and_sets_unreadable_images_apart() -> None:
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


Order = Callable[[BatchSplit], ShuffledBatchSampler]


def plain(count: int, *, seed: int = 3) -> Order:
    """Return what makes a sampler of `count` images for a process's share."""
    return lambda share: ShuffledBatchSampler(count, share, seed=seed)


def grouped(sizes: list[tuple[int, int]]) -> Order:
    """Return what makes a sampler of images of these sizes for a process's share."""
    return lambda share: ShuffledBatchSampler(len(sizes), share, seed=3, sizes=sizes)


def epoch_of(order: Order, effective: int, most: int, world_size: int) -> list[list[list[int]]]:
    """Return the images of epoch 2 as [steps][processes][images].

    Checks what holds for every order: equally many micro-batches in all processes, of at most the
    size asked.
    """
    ranks = []
    for rank in range(world_size):
        sampler = order(split_batch(effective, max_size=most, rank=rank, world_size=world_size))
        sampler.set_epoch(2)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.steps * sampler.accumulation
        assert all(0 < len(batch) <= most for batch in batches)
        size = sampler.accumulation
        parts = [list(chain(*batches[i : i + size])) for i in range(0, len(batches), size)]
        assert all(key.batch == step for step, part in enumerate(parts) for key in part)
        ranks.append([[key.position for key in part] for part in parts])
    assert len({len(steps) for steps in ranks}) == 1
    steps = [list(step) for step in zip(*ranks, strict=True)]
    assert all(sum(map(len, step)) == sampler.images for step in steps)
    return steps


def together(step: list[list[int]]) -> list[int]:
    """Return the images of a step on all processes, sorted."""
    return sorted(i for own in step for i in own)


@given(st.integers(1, 90), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4))
def test_a_step_has_the_same_images_however_it_is_split(
    count: int, per_process: int, most: int, world_size: int
) -> None:
    effective = per_process * world_size
    shared = epoch_of(plain(count), effective, most, world_size)
    alone = epoch_of(plain(count), effective, effective, 1)
    if count >= effective:
        assert [together(step) for step in shared] == [together(step) for step in alone]
        seen = [i for step in shared for i in together(step)]
        assert len(set(seen)) == len(seen) == count // effective * effective
        assert {len(own) for step in shared for own in step} == {per_process}
        return
    (step,) = shared  # too little data for one: all of it, and some twice where that is uneven
    assert together(alone[0]) == list(range(count))
    assert set(together(step)) == set(range(count))
    assert {len(own) for own in step} == {-(-count // world_size)}


@given(sizes, st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_images_of_both_orientations_are_not_in_one_step(
    sizes: list[tuple[int, int]], per_process: int, most: int, world_size: int
) -> None:
    effective = per_process * world_size
    shared = epoch_of(grouped(sizes), effective, most, world_size)
    alone = epoch_of(grouped(sizes), effective, effective, 1)
    portrait = [height > width for height, width in sizes]
    apart = min(portrait.count(True), portrait.count(False)) >= effective
    assert len(shared) == len(alone) >= 1
    for step, whole in zip(shared, alone, strict=True):
        if len(sizes) < effective:
            assert set(together(step)) == set(range(len(sizes)))
        else:
            assert together(step) == together(whole)
            assert len(set(together(step))) == effective
        if apart:
            assert len({portrait[i] for i in together(step)}) == 1


@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(0, 70), st.booleans())
def test_an_epoch_resumed_after_any_step_gives_exactly_the_rest(
    sizes: list[tuple[int, int]], own: int, most: int, first_step: int, by_aspect: bool
) -> None:
    share = split_batch(own * 2, max_size=most, rank=1, world_size=2)
    sampler = (grouped(sizes) if by_aspect else plain(len(sizes)))(share)
    sampler.set_epoch(5)
    whole = list(sampler)
    first_step = min(first_step, sampler.steps)
    sampler.set_epoch(5, first_step)
    assert list(sampler) == whole[first_step * sampler.accumulation :]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[SampleKey]]:
        sampler = plain(40, seed=seed)(BatchSplit(4))
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert len({str(order(*key)) for key in [(1, 2), (1, 3), (2, 2)]}) == 3


def test_the_few_images_of_the_other_orientation_are_seen_too() -> None:
    sampler = grouped([(1, 2)] * 20 + [(2, 1)] * 3)(BatchSplit(4))
    seen: set[int] = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        seen |= {key.position for batch in sampler for key in batch}
    assert seen == set(range(23))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 8))
def test_shares_make_up_the_effective_batch_in_the_largest_micro_batches(
    per_process: int, most: int, world_size: int
) -> None:
    effective = per_process * world_size
    share = split_batch(effective, max_size=most, rank=world_size - 1, world_size=world_size)
    assert share.effective == share.batch_size * share.accumulation * world_size == effective
    larger = range(share.batch_size + 1, most + 1)
    assert share.batch_size <= most
    assert all(per_process % size for size in larger)


def test_no_effective_batch_means_one_micro_batch_a_process() -> None:
    share = split_batch(0, max_size=3, rank=1, world_size=2)
    assert share == BatchSplit(batch_size=3, accumulation=1, rank=1, world_size=2)
    assert share.effective == 6


@pytest.mark.parametrize(("effective", "advice"), [(6, "Use 4,"), (3, "Use 4,"), (9, "Use 8,")])
def test_an_effective_batch_that_the_processes_cannot_share_is_refused(
    effective: int, advice: str
) -> None:
    with pytest.raises(ConfigError, match=f"^effective_batch_size {effective}: .* {advice}"):
        split_batch(effective, max_size=2, world_size=4)


@given(sizes, st.integers(1, 7), st.integers(1, 3))
def test_same_size_batches_hold_every_image_once(
    sizes: list[tuple[int, int]], batch_size: int, world_size: int
) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in same_size_batches(
            sizes, batch_size=batch_size, rank=rank, world_size=world_size
        )
    ]
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
    assert all(len(batch) <= batch_size for batch in batches)


def test_large_images_are_evaluated_first() -> None:
    batches = same_size_batches([(10, 10), (30, 40), (20, 20)], batch_size=2)
    assert batches == [[1], [2], [0]]


@pytest.fixture
def index(content: Content, write: Write) -> CocoIndex:
    """Return twelve images, the last one unreadable."""
    content["images"] += [
        {"id": 100 + i, "file_name": f"{100 + i}.png", "width": 40, "height": 30} for i in range(9)
    ]
    json_path, folder = write(content)
    (folder / "108.png").write_text("no image")
    return CocoIndex.load(json_path, folder, need_boxes=True)


def digest(batch: Batch) -> tuple[list[int], float]:
    """Return what a batch shows, in a form to compare."""
    ids = [int(target["image_id"]) for target in batch.targets]
    return ids, 0.0 if batch.images is None else float(batch.images.images.double().sum())


@pytest.mark.long
def test_training_is_the_same_with_and_without_workers(index: CocoIndex) -> None:
    epochs = {}
    for num_workers in (0, 2):
        loader = TrainLoader(
            CocoDetection(index, RANDOM, seed=5), BatchSplit(5), num_workers=num_workers, seed=5
        )
        assert len(loader) == 2
        runs = []
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            runs.append([digest(batch) for batch in loader])
        assert runs[0] == runs[2] != runs[1]
        epochs[num_workers] = runs
    assert epochs[0] == epochs[2]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone starts processes as copies safely")
def test_workers_share_the_index_whatever_python_starts_processes_with(index: CocoIndex) -> None:
    """With another method the data set would be pickled for each; here it cannot be."""
    dataset = CocoDetection(index, RANDOM)
    dataset.__dict__["unpicklable"] = lambda: None
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        train = TrainLoader(dataset, BatchSplit(5), num_workers=1, seed=5)
        val = eval_loader(dataset, batch_size=5, num_workers=1)
        assert len(list(train)) == 2
        assert sum(len(batch.targets) for batch in val) == 11
    finally:
        multiprocessing.set_start_method(usual, force=True)


def test_one_scale_for_a_batch_pads_nothing(index: CocoIndex) -> None:
    (index.image_dir / "108.png").write_bytes((index.image_dir / "107.png").read_bytes())
    shared = replace(RANDOM, random_crop=False, one_scale_per_batch=True)
    dataset = CocoDetection(index, shared, seed=2)
    loader = TrainLoader(dataset, BatchSplit(3), num_workers=0, seed=2)
    by_epoch = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        batches = [batch.images for batch in loader]
        for images, batch in zip(batches, loader, strict=True):
            same = len({tuple(t["orig_size"].tolist()) for t in batch.targets}) == 1
            assert images is not None
            assert not (same and images.mask.any())
        by_epoch.append([images.sizes[0] for images in batches if images is not None])
    assert len({str(sizes) for sizes in by_epoch}) > 1  # drawn again in every epoch
    assert any(len(set(sizes)) > 1 for sizes in by_epoch)  # and for every batch
    loader.set_epoch(4, first_step=2)
    resumed = [batch.images.sizes[0] for batch in loader if batch.images is not None]
    assert resumed == by_epoch[4][2:]


def test_resumed_epoch_continues_where_it_stopped(index: CocoIndex) -> None:
    loader = TrainLoader(CocoDetection(index, RANDOM), BatchSplit(3), num_workers=0, seed=0)
    loader.set_epoch(4)
    whole = [digest(batch) for batch in loader]
    loader.set_epoch(4, first_step=3)
    assert [digest(batch) for batch in loader] == whole[3:]
    loader.set_epoch(4)
    assert [digest(batch) for batch in loader] == whole


def test_images_are_augmented_alike_however_a_step_is_split(index: CocoIndex) -> None:
    shared = replace(RANDOM, one_scale_per_batch=True)
    seen = []
    for shares in (
        [BatchSplit(6)],
        [BatchSplit(2, accumulation=3)],
        [BatchSplit(1, accumulation=2, rank=rank, world_size=3) for rank in range(3)],
    ):
        sums: dict[int, float] = {}
        for share in shares:
            loader = TrainLoader(CocoDetection(index, shared), share, num_workers=0, seed=1)
            loader.set_epoch(1, first_step=1)
            for batch in loader:
                for i, target in enumerate(batch.targets):
                    assert batch.images is not None
                    sums[int(target["image_id"])] = float(batch.images.images[i].double().sum())
        seen.append(sums)
    assert len(seen[0]) >= 5  # of six, one image cannot be read
    assert seen[0].keys() == seen[1].keys() == seen[2].keys()
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-12)


def test_loading_leaves_the_global_random_numbers_alone(index: CocoIndex) -> None:
    loader = TrainLoader(CocoDetection(index, RANDOM), BatchSplit(4), num_workers=0, seed=0)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_data_smaller_than_a_batch_is_one_batch(index: CocoIndex) -> None:
    loader = TrainLoader(
        CocoDetection(index, RANDOM),
        BatchSplit(50),
        num_workers=0,
        seed=0,
        aspect_ratio_grouping=True,
    )
    (batch,) = loader
    assert len(batch.targets) + len(batch.unreadable) == 12


@pytest.mark.parametrize("batch_size", [1, 5])
def test_evaluation_sees_every_image_once_without_padding(
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


def a_batch(name: str, *, readable: bool) -> Batch:
    """Return a micro-batch of one image."""
    if not readable:
        return Batch(None, [], [UnreadableImage(0, name, "torn")])
    return Batch(pad_images([torch.ones(3, 4, 4)]), [{"image_id": torch.tensor(1)}], [])


def test_a_blank_image_stands_in_where_a_process_of_several_has_none() -> None:
    good, bad = a_batch("a", readable=True), a_batch("b", readable=False)
    first, blank = with_images([good, bad], alone=False)
    assert first is good
    assert blank.blank
    assert not good.blank
    assert blank.images is not None
    assert blank.images.images.shape[:2] == (1, 3)
    assert not blank.images.images.any()
    assert not blank.images.mask.any()
    assert [len(t["labels"]) for t in blank.targets] == [0]
    assert blank.unreadable == bad.unreadable


def test_alone_a_batch_without_an_image_is_dropped_but_its_images_are_named() -> None:
    good = [a_batch("", readable=True) for _ in range(2)]
    bad = [a_batch(name, readable=False) for name in "ab"]
    kept = with_images([bad[0], good[0], bad[1], good[1]], alone=True)
    assert [batch.images for batch in kept] == [batch.images for batch in good]
    assert [image.path for batch in kept for image in batch.unreadable] == ["a", "b"]
    assert not any(batch.blank for batch in kept)
    assert [batch.blank for batch in with_images(bad, alone=True)] == [True, True]
