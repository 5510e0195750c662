"""Joint preparation of a picture and its boxes: the recipe of DETR and Deformable DETR."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CHANNELS = 3


@dataclass(frozen=True)
class Sample:
    """A picture (RGB) with boxes [K,4] xyxy in its pixels and labels [K]."""

    image: Image.Image
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Prepared:
    """A normalised image [3,H,W] with boxes [K,4] xyxy in its pixels and labels [K]."""

    image: Tensor
    boxes: Tensor
    labels: Tensor


class Transform(Protocol):
    """Prepares a sample; random numbers are `generator`'s, those a batch shares `of_batch`'s."""

    def __call__(
        self, sample: Sample, generator: torch.Generator, of_batch: torch.Generator
    ) -> Prepared:
        """Return the picture as the model takes it."""

    def output_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the prepared (height, width) of a picture, None where it is random."""

    def largest_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the most that a picture of this size may get to be."""


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random flip, then a random scale or, half of the time, scale, crop and scale again.

    Units: scales are short sides in pixels; `max_size` bounds the long side except before the
    crop; `crop_size` holds the least and greatest side of the crop; `hflip` is a probability. With
    `one_scale_per_batch`, pictures of one size keep one size, and nothing is padded.
    """

    train_scales: tuple[int, ...]
    max_size: int
    hflip: float
    random_crop: bool
    crop_scales: tuple[int, ...]
    crop_size: tuple[int, int]
    one_scale_per_batch: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, sample: Sample, generator: torch.Generator, of_batch: torch.Generator
    ) -> Prepared:
        """Augment and normalise."""
        if float(torch.rand((), generator=generator)) < self.hflip:
            sample = flip(sample)
        if self.random_crop and float(torch.rand((), generator=generator)) < 0.5:
            sample = resize(sample, _choose(self.crop_scales, generator), None)
            sample = random_crop(sample, self.crop_size, generator)
        source = of_batch if self.one_scale_per_batch else generator
        sample = resize(sample, _choose(self.train_scales, source), self.max_size)
        return normalise(sample, self.mean, self.std)

    def output_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Return None: the size is drawn anew each time."""
        return None

    def largest_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the most (height, width) that an uncropped picture of this size may get."""
        return resized_size(height, width, max(self.train_scales), self.max_size)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """One scale: the short side becomes `eval_scale` unless the long one would pass `max_size`."""

    eval_scale: int
    max_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, sample: Sample, generator: torch.Generator, of_batch: torch.Generator
    ) -> Prepared:
        """Resize and normalise."""
        return normalise(resize(sample, self.eval_scale, self.max_size), self.mean, self.std)

    def output_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the (height, width) that a picture of this size will have."""
        return resized_size(height, width, self.eval_scale, self.max_size)

    def largest_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the same."""
        return resized_size(height, width, self.eval_scale, self.max_size)


def resized_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """Return (height, width) with the short side at `size`, or less if the long one hits its bound.

    The long side is truncated and the bounded short side rounded, as the official code does:
    640x480 at 800/1333 becomes 1066x800, 1200x400 becomes 1332x444 (width x height).
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    if short == size:
        return height, width
    other = int(size * long / short)
    return (other, size) if width < height else (size, other)


def resize(sample: Sample, size: int, max_size: int | None) -> Sample:
    """Scale picture and boxes by the rule of `resized_size` (bilinear, antialiased)."""
    width, height = sample.image.size
    new_height, new_width = resized_size(height, width, size, max_size)
    if (new_height, new_width) == (height, width):
        return sample
    image = sample.image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    factor = torch.tensor([new_width / width, new_height / height] * 2)
    return Sample(image, sample.boxes * factor, sample.labels)


def flip(sample: Sample) -> Sample:
    """Mirror left and right."""
    x0, y0, x1, y1 = sample.boxes.unbind(-1)
    width = sample.image.width
    boxes = torch.stack([width - x1, y0, width - x0, y1], dim=-1)
    image = sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Sample(image, boxes, sample.labels)


def random_crop(sample: Sample, sides: tuple[int, int], generator: torch.Generator) -> Sample:
    """Cut a rectangle out whose sides are drawn between the two of `sides` (pixels).

    A picture smaller than the least side keeps that side whole.
    """
    width, height = (_crop_side(full, sides, generator) for full in sample.image.size)
    left = _integer(0, sample.image.width - width, generator)
    top = _integer(0, sample.image.height - height, generator)
    return crop(sample, left, top, width, height)


def crop(sample: Sample, left: int, top: int, width: int, height: int) -> Sample:
    """Cut a rectangle out, clip the boxes to it and drop those without area."""
    image = sample.image.crop((left, top, left + width, top + height))
    boxes = sample.boxes - torch.tensor([left, top, left, top], dtype=sample.boxes.dtype)
    return clip_boxes(Sample(image, boxes, sample.labels))


def clip_boxes(sample: Sample) -> Sample:
    """Clip boxes to the picture and drop those without area."""
    width, height = sample.image.size
    bounds = torch.tensor([width, height, width, height], dtype=sample.boxes.dtype)
    boxes = torch.minimum(sample.boxes.clamp(min=0), bounds)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Sample(sample.image, boxes[keep], sample.labels[keep])


def normalise(sample: Sample, mean: Sequence[float], std: Sequence[float]) -> Prepared:
    """Turn the picture into a tensor in 0..1, less `mean`, over `std` (per channel)."""
    pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1).contiguous()
    image = (pixels.float() / 255 - _per_channel(mean)) / _per_channel(std)
    return Prepared(image, sample.boxes, sample.labels)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(CHANNELS, 1, 1)


def _crop_side(full: int, sides: tuple[int, int], generator: torch.Generator) -> int:
    least, greatest = (min(side, full) for side in sides)
    return _integer(least, greatest, generator)


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Draw a whole number in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _choose(values: Sequence[int], generator: torch.Generator) -> int:
    return values[_integer(0, len(values) - 1, generator)]
