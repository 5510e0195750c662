"""Augmentation of every kind: boxes stay on what they enclose.

The oracle is the image itself: each object is a rectangle of its label's colour on black.
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

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]])
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
    "all": replace(PLAIN, random_crop=True, scale_jitter=(0.5, 1.5), zoom_out=0.3),
}


def scene(seed: int) -> Sample:
    """Return an image of up to four rectangles of unlike colours, one in each quarter."""
    generator = seeded_generator(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    height, width = draw(90, 260), draw(90, 260)
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    labels = torch.randperm(len(COLOURS), generator=generator)[: draw(0, 4)]
    boxes = []
    for quarter, label in enumerate(labels):
        left = draw(0, width // 4) + quarter % 2 * (width // 2)
        top = draw(0, height // 4) + quarter // 2 * (height // 2)
        right, bottom = left + draw(4, width // 4), top + draw(4, height // 4)
        image[top:bottom, left:right] = COLOURS[label].to(torch.uint8)
        boxes.append([left, top, right, bottom])
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Sample(image.permute(2, 0, 1), corners, labels, (height, width))


def check_boxes_hold_their_colours(prepared: Sample) -> None:
    """Compare each colour's place with its boxes, a margin of blurred edges apart."""
    _, height, width = prepared.image.shape
    boxes, margin = prepared.boxes, 4.0
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height] * 2)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(prepared.labels) == len(boxes)
    pixels = prepared.image.permute(1, 2, 0) * 255
    for label, colour in enumerate(COLOURS):
        inside = torch.zeros(height, width, dtype=torch.bool)
        for x0, y0, x1, y1 in boxes[prepared.labels == label].tolist():
            core = pixels[
                int(y0 + margin) : max(0, int(y1 - margin)),
                int(x0 + margin) : max(0, int(x1 - margin)),
            ]
            assert ((core - colour).abs() < 60).all(), "a box covers what is not its object"
            rows = slice(max(0, int(y0 - margin)), int(y1 + margin) + 1)
            inside[rows, max(0, int(x0 - margin)) : int(x1 + margin) + 1] = True
        same = ((pixels - colour).abs() < 60).all(dim=2)
        assert not (same & ~inside).any(), "an object has no box"


@pytest.mark.parametrize("recipe", RECIPES)
@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_boxes_follow_their_objects(recipe: str, seed: int) -> None:
    prepared = RECIPES[recipe](scene(seed), seeded_generator(seed, 1), seeded_generator(seed, 2))
    check_boxes_hold_their_colours(prepared)
    height, width = prepared.image.shape[-2:]
    most = RECIPES[recipe].largest_size(*scene(seed).size)
    assert recipe not in ("jitter", "zoom_out") or (height <= most[0] and width <= most[1])


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


def test_mixing_ends_and_survives_unreadable_partners() -> None:
    mixing, own = Mixing(mosaic=1.0, mixup=0.0, until=3), scene(7)
    assert mixing(own, 3, lambda _: scene(8), seeded_generator(0)) is own
    alone = mixing(own, 2, lambda _: None, seeded_generator(0))
    assert set(alone.labels.tolist()) <= set(own.labels.tolist())
    blend = Mixing(mosaic=0.0, mixup=1.0, until=3)
    assert blend(own, 2, lambda _: None, seeded_generator(0)) is own
    assert len(blend(own, 2, lambda _: scene(8), seeded_generator(0)).boxes) == len(
        own.boxes
    ) + len(scene(8).boxes)
