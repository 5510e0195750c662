"""Padding of images into batches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from util.batch import Batch, UnreadableImage, pad_images

sides = st.integers(1, 9)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
def test_images_lie_top_left_and_the_mask_marks_the_rest(sizes: list[tuple[int, int]]) -> None:
    images = [torch.randn(3, h, w) for h, w in sizes]
    batch = pad_images(images)
    assert batch.sizes == tuple(sizes)
    assert batch.images.shape == (len(sizes), 3, max(s[0] for s in sizes), max(s[1] for s in sizes))
    assert batch.mask.dtype == torch.bool
    for image, padded, mask, (h, w) in zip(images, batch.images, batch.mask, sizes, strict=True):
        assert torch.equal(padded[:, :h, :w], image)
        assert (~mask).sum() == h * w
        assert not mask[:h, :w].any()
        assert not padded[:, mask].any()


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.integers(1, 8))
def test_sides_are_rounded_up_to_a_multiple(sizes: list[tuple[int, int]], multiple: int) -> None:
    images = [torch.randn(3, h, w) for h, w in sizes]
    batch, tight = pad_images(images, multiple=multiple), pad_images(images)
    height, width = tight.mask.shape[1:]
    for side, minimum in zip(batch.mask.shape[1:], (height, width), strict=True):
        assert side % multiple == 0
        assert minimum <= side < minimum + multiple
    assert batch.images.shape[2:] == batch.mask.shape[1:]
    assert torch.equal(batch.images[..., :height, :width], tight.images)
    assert torch.equal(batch.mask[:, :height, :width], tight.mask)
    assert batch.mask[:, height:].all()
    assert batch.mask[:, :, width:].all()
    assert not batch.images[batch.mask[:, None].expand_as(batch.images)].any()


def test_dtype_and_device_follow() -> None:
    batch = pad_images([torch.zeros(3, 2, 2, dtype=torch.float64)])
    assert batch.images.dtype == torch.float64
    moved = batch.to("meta")
    assert moved.images.is_meta
    assert moved.mask.is_meta
    assert moved.sizes == ((2, 2),)


def test_batch_may_hold_no_image() -> None:
    batch = Batch(None, [], [UnreadableImage(7, "a.jpg", "truncated")])
    assert batch.images is None
    assert batch.unreadable[0].image_id == 7
