"""Preparation of images with their boxes: DETR's recipe and stronger ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from datasets.sample import (
    Sample,
    Size,
    crop_anywhere,
    draw_chance,
    draw_integer,
    draw_uniform,
    flip,
    mean_colour,
    normalise,
    pad,
    random_crop,
    resize,
    resized_size,
    times,
)

_LONGEST_BEFORE_CROP = 16  # times max_size: else a line of 1 x 2000 pixels would take gigabytes
ZOOM_OUT = (0.35, 0.8)  # share of the canvas's sides that the image takes
_COLOUR_CHANGES = (
    (pixels.adjust_brightness, (0.7, 1.3)),
    (pixels.adjust_contrast, (0.7, 1.3)),
    (pixels.adjust_saturation, (0.5, 1.5)),
    (pixels.adjust_hue, (-0.04, 0.04)),  # of the colour circle
)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random flip, then a random scale or, half of the time, scale, crop and scale again.

    Units: scales are short sides in pixels; `max_size` bounds the long side except before the
    crop, where only strips would be larger than memory; `crop_size` holds the minimum and maximum
    side of the crop; `hflip`, `zoom_out` and `color_jitter` are probabilities; `scale_jitter` holds
    the minimum and maximum factor on the last scale, or nothing. With `one_scale_per_batch`,
    images of one size keep one size, and nothing is padded.

    A `fixed_size` other than 0 is the side, in pixels, of a square that takes the place of
    `train_scales` and `max_size`: the image is scaled to fit, and the rest filled with the mean
    colour. The model takes that for part of the image, so a smaller image has smaller objects.
    Outside the epochs of `strong_epochs` (None: all have it), images are flipped and scaled alone.
    """

    train_scales: tuple[int, ...]
    max_size: int
    hflip: float
    random_crop: bool
    crop_scales: tuple[int, ...]
    crop_size: tuple[int, ...]
    one_scale_per_batch: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale_jitter: tuple[float, ...] = ()
    zoom_out: float = 0.0
    color_jitter: float = 0.0
    fixed_size: int = 0
    strong_epochs: range | None = None

    def in_epoch(self, epoch: int) -> "TrainTransform":
        """Return the preparation of an epoch, counted from 0."""
        if self.strong_epochs is None or epoch in self.strong_epochs:
            return self
        return replace(self, random_crop=False, scale_jitter=(), zoom_out=0.0, color_jitter=0.0)

    def __call__(
        self, sample: Sample, generator: torch.Generator, batch_generator: torch.Generator
    ) -> Sample:
        """Return the image as the model takes it: augmented and normalised.

        Drawn from `generator`, or from `batch_generator` what the images of a batch share.
        """
        free = not sample.scaled
        if draw_chance(self.hflip, generator):
            sample = flip(sample)
        if free and self.random_crop and draw_chance(0.5, generator):
            scale = _choose(self.crop_scales, generator)
            size = resized_size(*sample.size, scale, _LONGEST_BEFORE_CROP * self.max_size)
            sample = resize(sample, size)
            sample = random_crop(sample, self.crop_size, generator)
        if self.fixed_size:
            size = fit(sample.size, self.fixed_size)
            window = (self.fixed_size, self.fixed_size)
        else:
            scale = _choose(
                self.train_scales, batch_generator if self.one_scale_per_batch else generator
            )
            window = size = resized_size(*sample.size, scale, self.max_size)
        fill = mean_colour(self.mean)
        if free and self.zoom_out and draw_chance(self.zoom_out, generator):
            sample = zoom_out(sample, size, fill, generator)
        elif free and self.scale_jitter:
            sample = scale_jitter(sample, size, window, self.scale_jitter, generator)
        else:
            sample = resize(sample, size)
        if self.color_jitter and draw_chance(self.color_jitter, generator):
            sample = replace(sample, image=color_jitter(sample.image, generator))
        if self.fixed_size:
            sample = pad(sample, window, fill)
        return normalise(sample, self.mean, self.std)

    def output_size(self, height: int, width: int) -> Size | None:
        """Return None: the size is drawn again each time."""
        return None

    def largest_size(self, height: int, width: int) -> Size:
        """Return the largest (height, width) that an uncropped image of this size may get."""
        if self.fixed_size:
            return self.fixed_size, self.fixed_size
        return resized_size(height, width, max(self.train_scales), self.max_size)

    def decoded_size(self, height: int, width: int) -> Size:
        """Return the minimum (height, width) to decode at: what any first resize may ask for."""
        zoom = max(1.0, self.scale_jitter[1]) if self.scale_jitter else 1.0
        if self.fixed_size:
            largest = fit((height, width), self.fixed_size)
        else:
            largest = self.largest_size(height, width)
        sizes = [tuple(round(side * zoom) for side in largest)]
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
    ) -> Sample:
        """Resize and normalise."""
        resized = resize(sample, self.output_size(*sample.size), exact=True)
        return normalise(resized, self.mean, self.std, exact=True)

    def in_epoch(self, epoch: int) -> "EvalTransform":
        """Return itself: every epoch is alike."""
        return self

    def output_size(self, height: int, width: int) -> Size:
        """Return the (height, width) that an image of this size will have."""
        return resized_size(height, width, self.eval_scale, self.max_size)

    largest_size = output_size

    def decoded_size(self, height: int, width: int) -> Size:
        """Return the whole size: nothing is decoded at less."""
        return height, width


Transform = TrainTransform | EvalTransform


def _choose(values: Sequence[int], generator: torch.Generator) -> int:
    return values[draw_integer(0, len(values) - 1, generator)]


def fit(size: Size, side: int) -> Size:
    """Return the (height, width) of an image of `size` scaled so that its long side is `side`."""
    return times(size, side / max(size))


def scale_jitter(
    sample: Sample,
    size: Size,
    window: Size,
    factors: tuple[float, ...],
    generator: torch.Generator,
) -> Sample:
    """Resize to `size` times a factor drawn from `factors`, and cut what is more than `window`.

    Large-scale jitter (arXiv 2012.07177) without its padding: what is smaller stays so.
    """
    low, high = factors
    scaled = resize(sample, times(size, draw_uniform(low, high, generator)))
    height, width = (min(full, side) for full, side in zip(scaled.size, window, strict=True))
    if (height, width) == scaled.size:
        return scaled
    return crop_anywhere(scaled, (height, width), generator)


def zoom_out(
    sample: Sample, size: Size, fill: tuple[int, ...], generator: torch.Generator
) -> Sample:
    """Put the image, made smaller, somewhere on a canvas of `size` in the colour `fill`."""
    small = resize(sample, times(size, draw_uniform(*ZOOM_OUT, generator)))
    left = draw_integer(0, size[1] - small.size[1], generator)
    top = draw_integer(0, size[0] - small.size[0], generator)
    return pad(small, size, fill, (top, left))


def color_jitter(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of uint8 [3,H,W], a little each."""
    for change, factors in _COLOUR_CHANGES:
        image = change(image, draw_uniform(*factors, generator))
    return image
