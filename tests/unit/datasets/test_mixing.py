"""Dense mosaics and pasted objects: what is drawn, where, and that its box lies there too."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from datasets.dataset import seeded_generator
from datasets.mixing import Affine, Mixing, Object, copy_blend, dense_mosaic, pastable
from datasets.sample import Sample, Size
from tests.unit.datasets.scenes import COLOURS, check_boxes_hold_their_colours, scene

DEIM = Affine(10.0, 0.1, 0.5, 1.5)
BLACK = (0, 0, 0)
seeds = st.integers(0, 10**6)


def noise(seed: int, size: Size, count: int = 6) -> Sample:
    """Return an image without two alike places, with boxes between pixels."""
    generator = seeded_generator(seed)
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
    height, width = size
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    return Sample(image.permute(2, 0, 1), boxes, torch.arange(count), size)


def discs(seed: int, size: Size, count: int) -> Sample:
    """Return an image of ellipses in their boxes, each of its label's colour."""
    generator = seeded_generator(seed)

    def draw() -> float:
        return float(torch.rand((), generator=generator))

    height, width = size
    rows, columns = torch.meshgrid(
        torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij"
    )
    image, boxes = torch.zeros(height, width, 3, dtype=torch.uint8), []
    for number in range(count):
        x0 = (number + 0.1 * float(torch.rand((), generator=generator))) * width / count
        y0 = 0.2 * height * float(torch.rand((), generator=generator))
        w, h = (
            0.8 * width / count,
            height * (0.3 + 0.4 * float(torch.rand((), generator=generator))),
        )
        inside = ((columns - x0 - w / 2) / (w / 2)) ** 2 + ((rows - y0 - h / 2) / (h / 2)) ** 2 <= 1
        image[inside] = COLOURS[number].to(torch.uint8)
        boxes.append([x0, y0, x0 + w, y0 + h])
    return Sample(
        image.permute(2, 0, 1), torch.tensor(boxes).reshape(-1, 4), torch.arange(count), size
    )


def extent(image: Tensor, label: int) -> list[float]:
    """Return the box xyxy of what has a colour."""
    mask = ((image.permute(1, 2, 0) - COLOURS[label]).abs() < 110).all(2)
    rows, columns = (mask.any(dim).nonzero()[:, 0] for dim in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_the_box_of_a_turned_ellipse_is_that_of_its_pixels(seed: int) -> None:
    """One image of four has objects, so that each colour is one object."""
    size = (200, 260)
    blank = discs(0, size, 0)
    affine = Affine(45.0, 0.05, 0.7, 1.1)
    mixed = dense_mosaic(
        [blank, discs(seed, size, 3), blank, blank], affine, BLACK, seeded_generator(seed)
    )
    assert mixed.size == size
    whole = (mixed.boxes[:, :2] > 2).all(1)
    whole &= (mixed.boxes[:, 2:] < torch.tensor(size[::-1]) - 2).all(1)
    for box, label in zip(mixed.boxes[whole].tolist(), mixed.labels[whole].tolist(), strict=True):
        assert box == pytest.approx(extent(mixed.image.int(), label), abs=2.0)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_a_straight_mosaic_shows_every_object_of_four_images(seed: int) -> None:
    scenes = [scene(seed + k) for k in range(4)]
    mixed = dense_mosaic(scenes, Affine(0.0, 0.0, 0.5, 1.0), BLACK, seeded_generator(seed))
    assert mixed.size == scenes[0].size == tuple(mixed.image.shape[-2:])
    assert len(mixed.boxes) == sum(len(s.boxes) for s in scenes)
    check_boxes_hold_their_colours(replace(mixed, image=mixed.image / 255))


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_turned_boxes_stay_inside_and_hold_pixels_of_their_objects(seed: int) -> None:
    scenes = [scene(seed + k) for k in range(4)]
    mixed = dense_mosaic(scenes, DEIM, BLACK, seeded_generator(seed))
    height, width = mixed.size
    assert (mixed.boxes >= 0).all()
    assert (mixed.boxes <= torch.tensor([width, height] * 2)).all()
    assert (mixed.boxes[:, 2:] > mixed.boxes[:, :2]).all()
    assert len(mixed.boxes) == len(mixed.labels)
    for (x0, y0, x1, y1), label in zip(mixed.boxes.tolist(), mixed.labels.tolist(), strict=True):
        inside = mixed.image[:, int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)].int()
        colour = COLOURS[label][:, None, None]
        # objects of few pixels have blended with the black around them
        assert (inside[colour[:, 0, 0] > 0].amin(0) >= 30).any()


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_a_mosaic_counts_in_pixels_of_the_whole_image(seed: int) -> None:
    scenes = [scene(seed + k) for k in range(4)]
    doubled = [
        Sample(s.image, s.boxes * 2, s.labels, (s.size[0] * 2, s.size[1] * 2)) for s in scenes
    ]
    a, b = (dense_mosaic(s, DEIM, BLACK, seeded_generator(seed)) for s in (scenes, doubled))
    assert b.size == doubled[0].size
    assert torch.equal(a.image, b.image)
    torch.testing.assert_close(b.boxes, a.boxes * 2, rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [(1, 900), (900, 1)])
@pytest.mark.parametrize("rotation", [0.0, 90.0])
def test_a_mosaic_of_strips_keeps_its_size(size: Size, rotation: float) -> None:
    strip, across = noise(0, size, 1), noise(1, size[::-1], 1)
    for seed in range(5):
        affine = Affine(rotation, 0.5, 0.1, 2.0)
        mixed = dense_mosaic(
            [strip, across, scene(seed), strip], affine, BLACK, seeded_generator(seed)
        )
        assert mixed.size == size == tuple(mixed.image.shape[-2:])


def test_what_a_mosaic_scaled_is_not_scaled_at_random_again() -> None:
    mixing = Mixing(mosaic=1.0, mixup=0.0, until=1, affine=DEIM)
    cut = replace(mixing, affine=None)
    own = scene(1)
    assert mixing(own, 0, lambda _: scene(2), seeded_generator(0)).scaled
    assert not cut(own, 0, lambda _: scene(2), seeded_generator(0)).scaled


@given(seeds, st.tuples(st.integers(20, 120), st.integers(20, 120)))
@settings(max_examples=60, deadline=None)
def test_pasted_objects_keep_their_size_and_stay_inside(seed: int, size: Size) -> None:
    own, other = noise(seed, size, 2), noise(seed + 1, (70, 80))
    pool = pastable(other, own)
    areas = [round(float((o.box[2] - o.box[0]) * (o.box[3] - o.box[1])), 2) for o in pool]
    for x0, y0, x1, y1 in (o.box.tolist() for o in pool):
        assert (x1 - x0) * (y1 - y0) >= 100
        assert x1 - x0 <= size[1]
        assert y1 - y0 <= size[0]
    pasted = copy_blend(own, pool, seeded_generator(seed))
    assert len(pasted.boxes) == len(pasted.labels) == 2 + min(3, len(pool))
    assert torch.equal(pasted.boxes[:2], own.boxes)
    assert pasted.size == size == tuple(pasted.image.shape[-2:])
    height, width = size
    assert (pasted.boxes[2:] >= 0).all()
    assert (pasted.boxes[2:] <= torch.tensor([width, height] * 2)).all()
    labels = [int(o.label) for o in pool]
    for (x0, y0, x1, y1), label in zip(
        pasted.boxes[2:].tolist(), pasted.labels[2:].tolist(), strict=True
    ):
        assert (x1 - x0) * (y1 - y0) == pytest.approx(areas[labels.index(label)], abs=0.02)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_pasted_pixels_are_those_of_the_object_and_its_margin(seed: int) -> None:
    own, other = noise(seed, (90, 110), 0), noise(seed + 1, (70, 80))
    pool = pastable(other, own)[:1]
    assume(pool)
    pasted = copy_blend(own, pool, seeded_generator(seed), below=(0.0, 0.0))
    shift = (pasted.boxes[0, :2] - pool[0].box[:2]).round().int().tolist()
    x0, y0, x1, y1 = pool[0].box.tolist()
    core = (slice(math.floor(y0), math.ceil(y1)), slice(math.floor(x0), math.ceil(x1)))
    place = [
        slice(part.start + by, part.stop + by) for part, by in zip(core, shift[::-1], strict=True)
    ]
    assert torch.equal(pasted.image[:, place[0], place[1]], other.image[:, core[0], core[1]])
    changed = (pasted.image != own.image).any(0).nonzero()
    margin = 0.25 * torch.tensor([y1 - y0, x1 - x0]) + 1
    box = pasted.boxes[0].flip(0)  # y1 x1 y0 x0
    assert (changed >= box[2:] - margin).all()
    assert (changed <= box[:2] + margin).all()


def test_half_of_what_lies_below_stays() -> None:
    white = Object(
        torch.full((3, 40, 40), 255, dtype=torch.uint8), torch.tensor([10.0, 10, 30, 30]),
        torch.tensor(5),
    )  # fmt: skip
    black = Sample(
        torch.zeros(3, 50, 60, dtype=torch.uint8), torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64), (100, 120),
    )  # fmt: skip
    for seed in range(20):
        pasted = copy_blend(black, [white], seeded_generator(seed))
        (box,), (label,) = pasted.boxes.tolist(), pasted.labels.tolist()
        assert label == 5
        assert (box[2] - box[0], box[3] - box[1]) == (
            40,
            40,
        )  # the image is half as large as it counts
        x0, y0, x1, y1 = (int(v) // 2 for v in box)
        core = pasted.image[:, y0:y1, x0:x1]
        assert int(core.min()) == int(core.max())
        assert 0.45 * 255 - 1 <= int(core.min()) <= 0.55 * 255 + 1
        assert not black.image.any()  # which is cached, and not to be written to


def test_phases_of_mixing() -> None:
    """Objects are pasted for longer than images are mixed, and into no mixup."""
    own, other = noise(0, (60, 80), 1), noise(1, (60, 80), 5)
    mixup = Mixing(mosaic=0.0, mixup=1.0, copy_blend=1.0, since=2, until=4, paste_until=6)
    counts = [
        len(mixup(own, epoch, lambda _: other, seeded_generator(epoch)).boxes) for epoch in range(8)
    ]
    assert counts == [1, 1, 6, 6, 4, 4, 1, 1]
    sparse = replace(noise(5, (60, 80), 1), boxes=torch.tensor([[10.5, 5.0, 40.0, 35.0]]))
    assert len(pastable(sparse, own)) == 1
    found = mixup(own, 5, lambda _: sparse, seeded_generator(0))
    assert len(found.boxes) == 4  # three images with an object each
    assert mixup(own, 5, lambda _: None, seeded_generator(0)) is own


def test_without_pasting_nothing_is_drawn_for_it() -> None:
    """What follows in the same stream, as flips and scales, does not depend on it."""
    own = noise(0, (60, 80), 1)
    generator, expected = seeded_generator(3), seeded_generator(3)
    mixing = Mixing(mosaic=0.0, mixup=0.0, until=4, paste_until=4)
    assert mixing(own, 0, lambda _: own, generator) is own
    for _ in ("mosaic", "mixup"):
        torch.rand((), generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
