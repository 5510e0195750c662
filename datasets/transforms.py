"""Joint preparation of an image and its boxes: DETR's recipe, and stronger."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from datasets.augment import color_jitter, scale_jitter, zoom_out
from datasets.sample import (
    Prepared,
    Sample,
    Size,
    draw_chance,
    draw_integer,
    flip,
    normalise,
    random_crop,
    resize,
    resized_size,
)

_LONGEST_BEFORE_CROP = 16  # times max_size: else a line of 1 x 2000 pixels would take gigabytes


class Transform(Protocol):
    """Prepares a sample, drawing from `generator`, or `batch_generator` for what is shared."""

    def __call__(
        self, sample: Sample, generator: torch.Generator, batch_generator: torch.Generator
    ) -> Prepared:
        """Return the image as the model takes it."""

    def output_size(self, height: int, width: int) -> Size | None:
        """Return the prepared (height, width) of an image, None where it is random."""

    def largest_size(self, height: int, width: int) -> Size:
        """Return the largest (height, width) that an image of this size may get."""

    def decoded_size(self, height: int, width: int) -> Size:
        """Return the minimum (height, width) that an image of this size may be decoded at."""


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random flip, then a random scale or, half of the time, scale, crop and scale again.

    Units: scales are short sides in pixels; `max_size` bounds the long side except before the
    crop, where only strips would be larger than memory; `crop_size` holds the minimum and maximum
    side of the crop; `hflip`, `zoom_out` and `color_jitter` are probabilities; `scale_jitter` holds
    the minimum and maximum factor on the last scale, or nothing. With `one_scale_per_batch`,
    images of one size keep one size, and nothing is padded.
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
    scale_jitter: tuple[float, float] | None = None
    zoom_out: float = 0.0
    color_jitter: float = 0.0

    def __call__(
        self, sample: Sample, generator: torch.Generator, batch_generator: torch.Generator
    ) -> Prepared:
        """Augment and normalise."""
        if draw_chance(self.hflip, generator):
            sample = flip(sample)
        if self.random_crop and draw_chance(0.5, generator):
            scale = _choose(self.crop_scales, generator)
            longest = _LONGEST_BEFORE_CROP * self.max_size
            sample = resize(sample, resized_size(*sample.size, scale, longest))
            sample = random_crop(sample, self.crop_size, generator)
        scale = _choose(
            self.train_scales, batch_generator if self.one_scale_per_batch else generator
        )
        size = resized_size(*sample.size, scale, self.max_size)
        if self.zoom_out and draw_chance(self.zoom_out, generator):
            fill = tuple(round(255 * value) for value in self.mean)  # as padding looks
            sample = zoom_out(sample, size, fill, generator)
        elif self.scale_jitter:
            sample = scale_jitter(sample, size, self.scale_jitter, generator)
        else:
            sample = resize(sample, size)
        if self.color_jitter and draw_chance(self.color_jitter, generator):
            sample = replace(sample, image=color_jitter(sample.image, generator))
        return normalise(sample, self.mean, self.std)

    def output_size(self, height: int, width: int) -> Size | None:
        """Return None: the size is drawn anew each time."""
        return None

    def largest_size(self, height: int, width: int) -> Size:
        """Return the largest (height, width) that an uncropped image of this size may get."""
        return resized_size(height, width, max(self.train_scales), self.max_size)

    def decoded_size(self, height: int, width: int) -> Size:
        """Return the largest size that any first resize may ask for."""
        zoom = max(1.0, self.scale_jitter[1]) if self.scale_jitter else 1.0
        sizes = [tuple(round(side * zoom) for side in self.largest_size(height, width))]
        if self.random_crop:
            sizes.append(resized_size(height, width, max(self.crop_scales), None))
        return max(size[0] for size in sizes), max(size[1] for size in sizes)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """One scale: the short side becomes `eval_scale` unless the long one would pass `max_size`.

    Pixels are the official ones to the last bit.
    """

    eval_scale: int
    max_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, sample: Sample, generator: torch.Generator, batch_generator: torch.Generator
    ) -> Prepared:
        """Resize and normalise."""
        size = resized_size(*sample.size, self.eval_scale, self.max_size)
        return normalise(resize(sample, size, exact=True), self.mean, self.std, exact=True)

    def output_size(self, height: int, width: int) -> Size | None:
        """Return the (height, width) that an image of this size will have."""
        return resized_size(height, width, self.eval_scale, self.max_size)

    def largest_size(self, height: int, width: int) -> Size:
        """Return the same."""
        return resized_size(height, width, self.eval_scale, self.max_size)

    def decoded_size(self, height: int, width: int) -> Size:
        """Return the whole size: nothing is decoded at less."""
        return height, width


def _choose(values: Sequence[int], generator: torch.Generator) -> int:
    return values[draw_integer(0, len(values) - 1, generator)]
