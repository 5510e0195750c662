"""Preparation of images with their boxes: DETR's recipe, stronger ones, images made of several."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from datasets.sample import (
    Sample,
    Size,
    counted_as,
    crop_anywhere,
    draw_chance,
    draw_integer,
    draw_uniform,
    flip,
    normalise,
    random_crop,
    resize,
    resized_size,
)

_LONGEST_BEFORE_CROP = 16  # times max_size: else a line of 1 x 2000 pixels would take gigabytes
ZOOM_OUT = (0.35, 0.8)  # share of the canvas's sides that the image takes
_COLOUR_CHANGES = (
    (pixels.adjust_brightness, (0.7, 1.3)),
    (pixels.adjust_contrast, (0.7, 1.3)),
    (pixels.adjust_saturation, (0.5, 1.5)),
    (pixels.adjust_hue, (-0.04, 0.04)),  # of the colour circle
)
_CENTRE = (0.3, 0.7)  # where a mosaic's four images meet, share of its sides
_MOST_CUT = 16  # areas of a tile that an image may be scaled to: strips would fill the memory
_OWN_SHARE = (0.4, 0.6)  # of a pixel that two images mix

Partner = Callable[[torch.Generator], Sample | None]


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
    crop_size: tuple[int, ...]
    one_scale_per_batch: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale_jitter: tuple[float, ...] = ()
    zoom_out: float = 0.0
    color_jitter: float = 0.0

    def __call__(
        self, sample: Sample, generator: torch.Generator, batch_generator: torch.Generator
    ) -> Sample:
        """Return the image as the model takes it: augmented and normalised.

        Drawn from `generator`, or from `batch_generator` what the images of a batch share.
        """
        if draw_chance(self.hflip, generator):
            sample = flip(sample)
        if self.random_crop and draw_chance(0.5, generator):
            scale = _choose(self.crop_scales, generator)
            size = resized_size(*sample.size, scale, _LONGEST_BEFORE_CROP * self.max_size)
            sample = resize(sample, size)
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
        """Return None: the size is drawn again each time."""
        return None

    def largest_size(self, height: int, width: int) -> Size:
        """Return the largest (height, width) that an uncropped image of this size may get."""
        return resized_size(height, width, max(self.train_scales), self.max_size)

    def decoded_size(self, height: int, width: int) -> Size:
        """Return the minimum (height, width) to decode at: what any first resize may ask for."""
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
    ) -> Sample:
        """Resize and normalise."""
        resized = resize(sample, self.output_size(*sample.size), exact=True)
        return normalise(resized, self.mean, self.std, exact=True)

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


def scale_jitter(
    sample: Sample, size: Size, factors: tuple[float, ...], generator: torch.Generator
) -> Sample:
    """Resize to `size` times a factor drawn from `factors`, and cut what is more than `size`.

    Large-scale jitter (arXiv 2012.07177) without its padding: what is smaller stays so.
    """
    low, high = factors
    scaled = resize(sample, _times(size, draw_uniform(low, high, generator)))
    height, width = (min(full, side) for full, side in zip(scaled.size, size, strict=True))
    if (height, width) == scaled.size:
        return scaled
    return crop_anywhere(scaled, (height, width), generator)


def zoom_out(
    sample: Sample, size: Size, fill: tuple[int, ...], generator: torch.Generator
) -> Sample:
    """Put the image, made smaller, somewhere on a canvas of `size` in the colour `fill`."""
    small = resize(sample, _times(size, draw_uniform(*ZOOM_OUT, generator)))
    height, width = small.size
    left = draw_integer(0, size[1] - width, generator)
    top = draw_integer(0, size[0] - height, generator)
    canvas = torch.empty(*size, len(fill), dtype=torch.uint8).permute(2, 0, 1)
    canvas.copy_(torch.tensor(fill, dtype=torch.uint8)[:, None, None])
    canvas[:, top : top + height, left : left + width] = small.image
    boxes = small.boxes + torch.tensor([left, top, left, top], dtype=small.boxes.dtype)
    return Sample(canvas, boxes, small.labels, size)


def color_jitter(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of uint8 [3,H,W], a little each."""
    for change, factors in _COLOUR_CHANGES:
        image = change(image, draw_uniform(*factors, generator))
    return image


def _times(size: Size, factor: float) -> Size:
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mosaic or mixup with the probabilities of these names, in epochs before `until`.

    `until` lets training end on images as they are.
    """

    mosaic: float
    mixup: float
    until: int

    def __call__(
        self, sample: Sample, epoch: int, partner: Partner, generator: torch.Generator
    ) -> Sample:
        """Return the sample, mixed or not; `partner` draws another, or None if unreadable."""
        if epoch >= self.until:
            return sample
        if draw_chance(self.mosaic, generator):
            others = [partner(generator) or sample for _ in range(3)]
            return mosaic([sample, *others], generator)
        if draw_chance(self.mixup, generator):
            other = partner(generator)
            return sample if other is None else mixup(sample, other, generator)
        return sample


def mosaic(samples: list[Sample], generator: torch.Generator) -> Sample:
    """Return four images around a point, each cut to its quarter, in the size of the first.

    An image is scaled to cover its quarter, whatever part of it is cut away (after YOLOv4, arXiv
    2004.10934). Which quarter is whose is drawn.
    """
    _, height, width = samples[0].image.shape
    y = round(height * draw_uniform(*_CENTRE, generator))
    x = round(width * draw_uniform(*_CENTRE, generator))
    corners = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
    image = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    boxes, labels = [], []
    for number, sample in zip(torch.randperm(4, generator=generator), samples, strict=True):
        top, left, bottom, right = corners[int(number)]
        if top == bottom or left == right:  # an image one pixel wide has two quarters
            continue
        tile = _cover(sample, (bottom - top, right - left), generator)
        image[:, top:bottom, left:right] = tile.image
        boxes.append(tile.boxes + torch.tensor([left, top, left, top]))
        labels.append(tile.labels)
    mixed = Sample(image, torch.cat(boxes), torch.cat(labels), (height, width))
    return counted_as(mixed, samples[0].size)


def mixup(sample: Sample, other: Sample, generator: torch.Generator) -> Sample:
    """Return the first image with the other blended into it, whole, with the boxes of both.

    Mixup of detectors (arXiv 1902.04103), without weights in the loss.
    """
    _, height, width = sample.image.shape
    small = resize(other, _times(other.size, min(height / other.size[0], width / other.size[1])))
    top = draw_integer(0, height - small.size[0], generator)
    left = draw_integer(0, width - small.size[1], generator)
    share = draw_uniform(*_OWN_SHARE, generator)
    image = sample.image.clone()
    part = image[:, top : top + small.size[0], left : left + small.size[1]]
    part.copy_(torch.lerp(small.image.float(), part.float(), share).round_())
    boxes = torch.cat(
        [
            counted_as(sample, (height, width)).boxes,
            small.boxes + torch.tensor([left, top, left, top]),
        ]
    )
    mixed = Sample(image, boxes, torch.cat([sample.labels, other.labels]), (height, width))
    return counted_as(mixed, sample.size)


def _cover(sample: Sample, size: Size, generator: torch.Generator) -> Sample:
    """Scale an image until it covers `size`, and cut it to that somewhere."""
    factor = max(side / full for side, full in zip(size, sample.size, strict=True))
    if math.prod(sample.size) * factor**2 > _MOST_CUT * math.prod(size):
        # Cut out what will cover it before that is scaled, by a factor of its own.
        height, width = (
            min(full, math.ceil(side / factor))
            for side, full in zip(size, sample.size, strict=True)
        )
        sample = crop_anywhere(sample, (height, width), generator)
        factor = max(side / full for side, full in zip(size, sample.size, strict=True))
    height, width = (
        max(side, math.ceil(full * factor - 1e-6))
        for side, full in zip(size, sample.size, strict=True)
    )
    return crop_anywhere(resize(sample, (height, width)), size, generator)
