"""Preparation of images: the published resize rule, and boxes that follow their pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.dataset import make_target, seeded_generator
from datasets.sample import (
    Sample,
    crop,
    flip,
    normalise,
    random_crop,
    resize,
    resized_size,
    to_pixels,
)
from datasets.transforms import EvalTransform, TrainTransform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))


def sample_of(image: Image.Image, boxes: torch.Tensor, labels: torch.Tensor) -> Sample:
    return Sample(to_pixels(image), boxes, labels, (image.height, image.width))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    count = draw(st.integers(0, 5))
    corners = torch.rand(count, 2, 2, generator=seeded_generator(draw(st.integers(0, 999))))
    low, high = corners.min(1).values, corners.max(1).values
    scale = torch.tensor([width, height] * 2)
    boxes = torch.cat([low, high], dim=1) * scale
    return sample_of(random_image(width, height), boxes, torch.arange(count))


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
        (1000, 1, 800, 1333, (1000, 1)),
        (3000, 1, 800, 1333, (1333, 1)),
        (2, 9000, 800, 1333, (1, 1333)),
    ],
)
def test_resized_size_follows_the_published_rule(
    width: int, height: int, size: int, max_size: int | None, expected: tuple[int, int]
) -> None:
    assert resized_size(height, width, size, max_size) == expected[::-1]


def test_image_of_the_right_size_is_returned_as_it_is() -> None:
    sample = sample_of(random_image(40, 30), torch.tensor([[1.0, 2, 3, 4]]), torch.zeros(1))
    assert resize(sample, (30, 40)).image is sample.image


def test_resize_moves_boxes_with_their_pixels() -> None:
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    pixels[10:30, 20:60] = 255
    sample = sample_of(Image.fromarray(pixels), torch.tensor([[20.0, 10, 60, 30]]), torch.zeros(1))
    large = resize(sample, (200, 400))
    bright = large.image[0].numpy() > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    measured = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(large.boxes[0].numpy(), measured, atol=1)


@given(samples())
@settings(max_examples=40)
def test_flipping_twice_changes_nothing(sample: Sample) -> None:
    twice = flip(flip(sample))
    torch.testing.assert_close(twice.boxes, sample.boxes, rtol=0, atol=1e-4)
    assert torch.equal(twice.image, sample.image)


def test_flip_mirrors_boxes() -> None:
    sample = sample_of(random_image(40, 30), torch.tensor([[1.0, 2, 11, 12]]), torch.zeros(1))
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
    target = make_target(prepared, 1, sample.size)
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
    for side, full in zip(cut.size, sample.size, strict=True):
        assert min(20, full) <= side <= min(50, full)


def test_random_crop_reaches_both_bounds_and_all_corners() -> None:
    sample = sample_of(random_image(12, 12), torch.zeros(0, 4), torch.zeros(0))
    widths = {random_crop(sample, (9, 11), seeded_generator(i)).size[1] for i in range(60)}
    assert widths == {9, 10, 11}


def test_crop_clips_boxes_and_drops_those_outside() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 25], [12, 0, 20, 4.5], [2, 2, 4, 8]])
    cut = crop(sample_of(random_image(40, 30), boxes, torch.arange(4)), 4, 5, 16, 15)
    assert cut.size == (15, 16)
    assert cut.labels.tolist() == [0, 1]
    assert cut.boxes.tolist() == [[0, 0, 6, 5], [1, 0, 16, 15]]
    original = np.asarray(random_image(40, 30))[5:20, 4:20]
    np.testing.assert_array_equal(cut.image.permute(1, 2, 0).numpy(), original)


def test_normalise_matches_its_definition() -> None:
    sample = sample_of(random_image(7, 5), torch.zeros(0, 4), torch.zeros(0))
    image = normalise(sample, MEAN, STD).image
    pixels = np.asarray(random_image(7, 5)) / 255
    expected = (pixels[2, 3] - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(image[:, 2, 3].numpy(), expected, rtol=1e-5)


def test_eval_transform_predicts_its_output_size() -> None:
    transform = EvalTransform(eval_scale=50, max_size=70, mean=MEAN, std=STD)
    for width, height in [(30, 20), (20, 90), (70, 50), (33, 33)]:
        sample = sample_of(random_image(width, height), torch.zeros(0, 4), torch.zeros(0))
        image = transform(sample, torch.Generator(), torch.Generator()).image
        assert tuple(image.shape[-2:]) == transform.output_size(height, width)


def as_officially(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Resize by Pillow and normalise in three separate steps, as the official code does."""
    resized = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std


@given(st.integers(1, 90), st.integers(1, 90), st.integers(16, 120))
@settings(max_examples=30)
def test_evaluation_has_the_official_bits_and_training_differs_by_rounding(
    width: int, height: int, scale: int
) -> None:
    image, none = random_image(width, height), torch.Generator()
    sample = sample_of(image, torch.zeros(0, 4), torch.zeros(0))
    expected = as_officially(image, resized_size(height, width, scale, 150))
    evaluated = EvalTransform(eval_scale=scale, max_size=150, mean=MEAN, std=STD)
    assert torch.equal(evaluated(sample, none, none).image, expected)
    trained = TrainTransform(
        train_scales=(scale,),
        max_size=150,
        hflip=0,
        random_crop=False,
        crop_scales=(40,),
        crop_size=(20, 50),
        one_scale_per_batch=False,
        mean=MEAN,
        std=STD,
    )
    steps = (trained(sample, none, none).image - expected).abs() * torch.tensor(STD).view(3, 1, 1)
    assert float(steps.max()) * 255 < 1.01


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_images_decoded_at_less_have_the_same_boxes_and_size(seed: int) -> None:
    whole = sample_of(random_image(401, 303), torch.tensor([[20.0, 30, 200, 150]]), torch.ones(1))
    half = Sample(to_pixels(random_image(201, 152)), whole.boxes, whole.labels, whole.size)
    transform = TrainTransform(
        train_scales=(40, 60),
        max_size=90,
        hflip=0.5,
        random_crop=True,
        crop_scales=(50, 70),
        crop_size=(20, 50),
        one_scale_per_batch=False,
        mean=MEAN,
        std=STD,
    )
    generators = [(seeded_generator(seed), seeded_generator(seed + 1)) for _ in range(2)]
    a, b = transform(whole, *generators[0]), transform(half, *generators[1])
    assert a.image.shape == b.image.shape
    assert torch.equal(a.boxes, b.boxes)
    height, width = transform.decoded_size(303, 401)
    assert (height, width) == resized_size(303, 401, 70, None)
