"""Preparation of pictures: the published resize rule, and boxes that follow their pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.coco import make_target, seeded_generator
from datasets.transforms import (
    EvalTransform,
    Sample,
    TrainTransform,
    crop,
    flip,
    normalise,
    random_crop,
    resize,
    resized_size,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    count = draw(st.integers(0, 5))
    corners = torch.rand(count, 2, 2, generator=seeded_generator(draw(st.integers(0, 999))))
    low, high = corners.min(1).values, corners.max(1).values
    scale = torch.tensor([width, height] * 2)
    boxes = torch.cat([low, high], dim=1) * scale
    return Sample(picture(width, height), boxes, torch.arange(count))


@pytest.mark.parametrize(
    ("width", "height", "size", "max_size", "expected"),
    [
        (640, 480, 800, 1333, (1066, 800)),
        (480, 640, 800, 1333, (800, 1066)),
        (1200, 400, 800, 1333, (1332, 444)),
        (400, 1200, 800, 1333, (444, 1332)),
        (500, 375, 800, 1333, (1066, 800)),
        (1333, 800, 800, 1333, (1333, 800)),
        (800, 800, 800, 1333, (800, 800)),
        (640, 427, 480, 1333, (719, 480)),
        (640, 480, 600, None, (800, 600)),
        (4000, 400, 600, None, (6000, 600)),
        (3000, 1, 800, 1333, (3000, 1)),
    ],
)
def test_resized_size_follows_the_published_rule(
    width: int, height: int, size: int, max_size: int | None, expected: tuple[int, int]
) -> None:
    assert resized_size(height, width, size, max_size) == expected[::-1]


def test_picture_of_the_right_size_is_returned_as_it_is() -> None:
    sample = Sample(picture(40, 30), torch.tensor([[1.0, 2, 3, 4]]), torch.zeros(1))
    assert resize(sample, 30, 100) is sample


def test_resize_moves_boxes_with_their_pixels() -> None:
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    pixels[10:30, 20:60] = 255
    sample = Sample(Image.fromarray(pixels), torch.tensor([[20.0, 10, 60, 30]]), torch.zeros(1))
    large = resize(sample, 200, None)
    bright = np.asarray(large.image)[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    measured = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(large.boxes[0].numpy(), measured, atol=1)


@given(samples())
@settings(max_examples=40)
def test_flipping_twice_changes_nothing(sample: Sample) -> None:
    twice = flip(flip(sample))
    torch.testing.assert_close(twice.boxes, sample.boxes, rtol=0, atol=1e-4)
    assert twice.image.tobytes() == sample.image.tobytes()


def test_flip_mirrors_boxes() -> None:
    sample = Sample(picture(40, 30), torch.tensor([[1.0, 2, 11, 12]]), torch.zeros(1))
    assert flip(sample).boxes.tolist() == [[29.0, 2, 39, 12]]


@given(samples(), st.integers(0, 10**6))
@settings(max_examples=60)
def test_any_chain_keeps_boxes_inside(sample: Sample, seed: int) -> None:
    transform = TrainTransform(
        train_scales=(32, 48, 70),
        max_size=90,
        hflip=0.5,
        random_crop=True,
        crop_scales=(40, 60),
        crop_size=(20, 50),
        one_scale_per_batch=False,
        mean=MEAN,
        std=STD,
    )
    prepared = transform(sample, seeded_generator(seed), seeded_generator(0))
    target = make_target(prepared, 1, (sample.image.height, sample.image.width))
    centre, half = target["boxes"][:, :2], target["boxes"][:, 2:] / 2
    assert (half >= 0).all()
    assert (centre - half >= -1e-5).all()
    assert (centre + half <= 1 + 1e-5).all()
    assert len(target["labels"]) == len(target["boxes"]) <= len(sample.boxes)
    assert target["size"].tolist() == list(prepared.image.shape[-2:])
    again = transform(sample, seeded_generator(seed), seeded_generator(0))
    assert torch.equal(again.image, prepared.image)


@given(samples(), st.integers(0, 10**6))
@settings(max_examples=40)
def test_random_crop_stays_within_its_bounds(sample: Sample, seed: int) -> None:
    cut = random_crop(sample, (20, 50), seeded_generator(seed))
    for side, full in zip(cut.image.size, sample.image.size, strict=True):
        assert min(20, full) <= side <= min(50, full)


def test_random_crop_reaches_both_bounds_and_all_corners() -> None:
    sample = Sample(picture(12, 12), torch.zeros(0, 4), torch.zeros(0))
    widths = {random_crop(sample, (9, 11), seeded_generator(i)).image.width for i in range(60)}
    assert widths == {9, 10, 11}


def test_crop_clips_boxes_and_drops_those_outside() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 25], [12, 0, 20, 4.5], [2, 2, 4, 8]])
    cut = crop(Sample(picture(40, 30), boxes, torch.arange(4)), 4, 5, 16, 15)
    assert cut.image.size == (16, 15)
    assert cut.labels.tolist() == [0, 1]
    assert cut.boxes.tolist() == [[0, 0, 6, 5], [1, 0, 16, 15]]
    original = np.asarray(picture(40, 30))[5:20, 4:20]
    np.testing.assert_array_equal(np.asarray(cut.image), original)


def test_normalise_matches_its_definition() -> None:
    sample = Sample(picture(7, 5), torch.zeros(0, 4), torch.zeros(0))
    image = normalise(sample, MEAN, STD).image
    pixels = np.asarray(sample.image) / 255
    expected = (pixels[2, 3] - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(image[:, 2, 3].numpy(), expected, rtol=1e-5)


def test_eval_transform_tells_its_output_size() -> None:
    transform = EvalTransform(eval_scale=50, max_size=70, mean=MEAN, std=STD)
    for width, height in [(30, 20), (20, 90), (70, 50), (33, 33)]:
        sample = Sample(picture(width, height), torch.zeros(0, 4), torch.zeros(0))
        image = transform(sample, torch.Generator(), torch.Generator()).image
        assert tuple(image.shape[-2:]) == transform.output_size(height, width)
