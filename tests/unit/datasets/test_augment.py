"""Augmentation of every kind: boxes stay on what they enclose.

The oracle is the image itself; see `scenes`.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.dataset import seeded_generator
from datasets.mixing import Mixing, mixup, mosaic
from datasets.sample import Sample, Size
from datasets.transforms import TrainTransform, color_jitter
from tests.unit.datasets.scenes import check_boxes_hold_their_colours, scene

PLAIN = TrainTransform(
    train_scales=(160, 240),
    max_size=400,
    hflip=0.5,
    random_crop=False,
    crop_scales=(120, 180),
    crop_size=(80, 150),
    one_scale_per_batch=False,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
RECIPES = {
    "official": replace(PLAIN, random_crop=True),
    "jitter": replace(PLAIN, scale_jitter=(0.4, 1.8)),
    "zoom_out": replace(PLAIN, zoom_out=1.0),
    "square": replace(PLAIN, random_crop=True, fixed_size=200, scale_jitter=(0.2, 2.0)),
    "all": replace(PLAIN, random_crop=True, scale_jitter=(0.5, 1.5), zoom_out=0.3),
}


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_boxes_follow_their_objects(recipe: str, seed: int) -> None:
    prepared = RECIPES[recipe](scene(seed), seeded_generator(seed, 1), seeded_generator(seed, 2))
    check_boxes_hold_their_colours(prepared)
    height, width = prepared.image.shape[-2:]
    most = RECIPES[recipe].largest_size(*scene(seed).size)
    assert recipe not in ("jitter", "zoom_out") or (height <= most[0] and width <= most[1])
    assert recipe != "square" or (height, width) == most == (200, 200)


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_mosaics_hold_the_objects_of_four_images(seed: int) -> None:
    scenes = [scene(seed + k) for k in range(4)]
    mixed = mosaic(scenes, seeded_generator(seed))
    assert mixed.size == scenes[0].size == tuple(mixed.image.shape[-2:])
    check_boxes_hold_their_colours(replace(mixed, image=mixed.image / 255))


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_mosaics_of_images_decoded_at_half_size_are_labelled_in_the_whole(seed: int) -> None:
    scenes = [scene(seed + k) for k in range(4)]
    halves = [
        Sample(s.image, s.boxes * 2, s.labels, (s.size[0] * 2, s.size[1] * 2)) for s in scenes
    ]
    a = mosaic(scenes, seeded_generator(seed))
    b = mosaic(halves, seeded_generator(seed))
    assert b.size == halves[0].size
    assert len(a.boxes) == len(b.boxes)
    torch.testing.assert_close(b.boxes, a.boxes * 2, rtol=0, atol=0.05)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_mixup_shows_both_images(seed: int) -> None:
    own, other = scene(seed), scene(seed + 1)
    red = replace(
        own, image=own.image.amax(0, keepdim=True) * torch.tensor([1, 0, 0])[:, None, None]
    )
    blue = replace(
        other, image=other.image.amax(0, keepdim=True) * torch.tensor([0, 0, 1])[:, None, None]
    )
    red, blue = (replace(s, image=s.image.to(torch.uint8)) for s in (red, blue))
    mixed = mixup(red, blue, seeded_generator(seed))
    count = len(own.boxes)
    assert mixed.size == own.size
    assert torch.equal(mixed.boxes[:count], own.boxes)
    assert torch.equal(mixed.labels, torch.cat([own.labels, other.labels]))
    for number, box in enumerate(mixed.boxes.tolist()):
        x0, y0, x1, y1 = (round(v) for v in box)
        core = mixed.image[:, y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]
        channel = 0 if number < count else 2
        if core.numel():
            assert int(core[channel].min()) >= 95
    assert int(mixed.image[2].max()) <= 155


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most elements that any tensor had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numel = max(self.numel, made.numel())
        return made


def white(size: Size) -> Sample:
    """Return a white image with a box around it."""
    image = torch.full((*size, 3), 255, dtype=torch.uint8).permute(2, 0, 1)
    return Sample(image, torch.tensor([[0.0, 0, size[1], size[0]]]), torch.zeros(1), size)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(1, 900), (900, 1)])
def test_strips_take_little_memory_and_keep_their_boxes(name: str, size: tuple[int, int]) -> None:
    """Scaled to a short side of 180, a line of 900 pixels would be 160,000 long."""
    strip, across = white(size), white(size[::-1])
    for seed in range(4):
        with Largest() as largest:
            prepared = RECIPES[name](strip, seeded_generator(seed), seeded_generator(seed))
            mixed = mosaic([scene(seed), strip, strip, strip], seeded_generator(seed))
            crossed = mosaic([strip, across, strip, across], seeded_generator(seed))
        assert largest.numel < 6e6
        assert len(prepared.boxes) == 1
        assert tuple(mixed.image.shape[-2:]) == mixed.size
        assert crossed.size == size
        assert int(mixed.image[:, mixed.image.shape[1] // 2].max()) == 255


def test_colours_change_and_nothing_else() -> None:
    image = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).permute(2, 0, 1)
    changed = color_jitter(image, seeded_generator(1))
    assert changed.shape == image.shape
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, image)
    assert torch.equal(changed, color_jitter(image, seeded_generator(1)))


def test_mixing_survives_unreadable_partners() -> None:
    mixing, own = Mixing(mosaic=1.0, mixup=0.0, until=3), scene(7)
    assert mixing(own, 3, lambda _: scene(8), seeded_generator(0)) is own
    alone = mixing(own, 2, lambda _: None, seeded_generator(0))
    assert set(alone.labels.tolist()) <= set(own.labels.tolist())
    blend = Mixing(mosaic=0.0, mixup=1.0, until=3)
    assert blend(own, 2, lambda _: None, seeded_generator(0)) is own
    assert len(blend(own, 2, lambda _: scene(8), seeded_generator(0)).boxes) == len(
        own.boxes
    ) + len(scene(8).boxes)


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (90, 90), (1, 90)])
def test_a_fixed_square_holds_the_whole_image_and_the_mean_colour(size: Size) -> None:
    mean = (0.4, 0.2, 0.6)
    transform = replace(PLAIN, hflip=0.0, fixed_size=45, mean=mean)
    generator = seeded_generator(0)
    prepared = transform(white(size), generator, generator)
    height, width = (max(1, side // 2) for side in size)
    assert prepared.image.shape == (3, 45, 45)
    assert prepared.boxes.tolist() == [[0, 0, width, height]]
    shown = prepared.image + torch.tensor(mean)[:, None, None]
    assert (shown[:, :height, :width] - 1).abs().max() < 1e-5
    assert prepared.image[:, height:].abs().max() <= 0.5 / 255 + 1e-6 if height < 45 else True
    assert prepared.image[:, :, width:].abs().max() <= 0.5 / 255 + 1e-6 if width < 45 else True


def test_outside_its_epochs_strong_augmentation_leaves_flips_and_scales() -> None:
    flips_and_scales = replace(PLAIN, fixed_size=200)
    strong = replace(
        flips_and_scales, random_crop=True, scale_jitter=(0.2, 2.0), zoom_out=0.5, color_jitter=1.0,
        strong_epochs=range(2, 4),
    )  # fmt: skip
    for seed in range(5):
        plain, *phases = (
            transform(scene(seed), seeded_generator(seed), seeded_generator(seed)).image
            for transform in (flips_and_scales, *map(strong.in_epoch, (1, 2, 3, 4)))
        )
        assert [torch.equal(image, plain) for image in phases] == [True, False, False, True]
