"""Training images made of several: mosaic and mixup."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from datasets.sample import (
    Sample,
    Size,
    counted_as,
    crop_anywhere,
    draw_chance,
    draw_integer,
    draw_uniform,
    resize,
)

Partner = Callable[[torch.Generator], Sample | None]
_CENTRE = (0.3, 0.7)  # where a mosaic's four images meet, share of its sides
_MOST_CUT = 16  # areas of a tile that an image may be scaled to: strips would fill the memory
_OWN_SHARE = (0.4, 0.6)  # of a pixel that two images mix


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
            others = [partner(generator) for _ in range(3)]
            return mosaic([sample, *(other or sample for other in others)], generator)
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
    factor = min(height / other.size[0], width / other.size[1])
    small = resize(other, _scaled(other.size, factor, within=(height, width)))
    top = draw_integer(0, height - small.size[0], generator)
    left = draw_integer(0, width - small.size[1], generator)
    share = draw_uniform(*_OWN_SHARE, generator)
    image = sample.image.clone()
    part = image[:, top : top + small.size[0], left : left + small.size[1]]
    part.copy_(torch.lerp(small.image.float(), part.float(), share).round_())
    own = counted_as(sample, (height, width))
    boxes = torch.cat([own.boxes, small.boxes + torch.tensor([left, top, left, top])])
    labels = torch.cat([sample.labels, other.labels])
    return counted_as(Sample(image, boxes, labels, (height, width)), sample.size)


def _cover(sample: Sample, size: Size, generator: torch.Generator) -> Sample:
    """Scale an image until it covers `size`, and cut it to that somewhere."""
    factor = max(side / full for side, full in zip(size, sample.size, strict=True))
    if math.prod(sample.size) * factor**2 > _MOST_CUT * math.prod(size):
        sample, factor = _cut_strip(sample, size, factor, generator)
    height, width = (
        max(side, math.ceil(full * factor - 1e-6))
        for side, full in zip(size, sample.size, strict=True)
    )
    return crop_anywhere(resize(sample, (height, width)), size, generator)


def _cut_strip(
    sample: Sample, size: Size, factor: float, generator: torch.Generator
) -> tuple[Sample, float]:
    """Cut what will cover `size` out before it is scaled; return it and its own factor."""
    height, width = (
        min(full, math.ceil(side / factor)) for side, full in zip(size, sample.size, strict=True)
    )
    part = crop_anywhere(sample, (height, width), generator)
    return part, max(side / full for side, full in zip(size, part.size, strict=True))


def _scaled(size: Size, factor: float, *, within: Size) -> Size:
    height, width = (
        max(1, min(bound, round(side * factor))) for side, bound in zip(size, within, strict=True)
    )
    return height, width
