"""Training images made of several: mosaics, mixup, pasted objects."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from datasets.sample import (
    Sample,
    Size,
    blank,
    clip_boxes,
    counted_as,
    crop_anywhere,
    draw_chance,
    draw_integer,
    draw_uniform,
    resize,
    times,
    to_pixels,
)

_CENTRE = (0.3, 0.7)  # where a mosaic's four images meet, share of its sides
_MOST_CUT = 16  # areas of a tile that an image may be scaled to: strips would fill the memory
_LEAST_SEEN = 0.25  # of a turned box: in less there may be nothing of an object that lies aslant
_OWN_SHARE = (0.4, 0.6)  # of a pixel that two images mix
_PASTED, _PARTNERS = 3, 3  # objects at most, out of this many images at most
_SMALLEST_PASTED = 100  # pixels
_MARGIN = (0.10, 0.25)  # of an object's sides, pasted with it on each side
_PASTE_SHARE = (0.45, 0.55)  # of a pixel that stays below a pasted object

Partner = Callable[[torch.Generator], Sample | None]


class Affine(NamedTuple):
    """What a dense mosaic's canvas may be drawn to do."""

    rotation: float  # degrees, either way
    shift: float  # share of the sides, either way
    smallest: float  # factor on its size
    largest: float


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mosaic, mixup and pasted objects with the probabilities of these names.

    Mosaic and mixup take place in the epochs from `since` to before `until`, pasting to before
    `paste_until`, so that training ends on images as they are. With `affine` mosaics are dense
    ones, on the colour `fill`.
    """

    mosaic: float
    mixup: float
    until: int
    copy_blend: float = 0.0
    paste_until: int = 0
    since: int = 0
    affine: Affine | None = None
    fill: tuple[int, ...] = (0, 0, 0)

    def __call__(
        self, sample: Sample, epoch: int, partner: Partner, generator: torch.Generator
    ) -> Sample:
        """Return the sample, mixed or not; `partner` draws another, or None if unreadable."""
        if epoch < self.since:
            return sample
        if epoch < self.until:
            if draw_chance(self.mosaic, generator):
                samples = [sample, *(partner(generator) or sample for _ in range(3))]
                if self.affine is None:
                    sample = mosaic(samples, generator)
                else:
                    sample = dense_mosaic(samples, self.affine, self.fill, generator)
            elif draw_chance(self.mixup, generator):
                other = partner(generator)
                return sample if other is None else mixup(sample, other, generator)
        # Without the option nothing is drawn for it, and images stay what they were before it.
        if self.copy_blend and epoch < self.paste_until and draw_chance(self.copy_blend, generator):
            return copy_blend(sample, _objects(sample, partner, generator), generator)
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


def dense_mosaic(
    samples: Sequence[Sample], affine: Affine, fill: Sequence[int], generator: torch.Generator
) -> Sample:
    """Return four whole images in a grid that is scaled, turned and shifted (after DEIM).

    The result has the size of the first; each image is scaled to fit a quarter of that and lies
    against the middle of the grid. A turned box encloses the ellipse of the box before, as its
    corners are mostly empty (Kalra et al., ICCV 2021); it is kept if a quarter of it is seen.
    """
    _, height, width = samples[0].image.shape
    angle = math.radians(draw_uniform(-affine.rotation, affine.rotation, generator))
    scale = draw_uniform(affine.smallest, affine.largest, generator)
    shift = [
        side * draw_uniform(-affine.shift, affine.shift, generator) for side in (width, height)
    ]
    cell = times((height, width), scale / 2)
    sin, cos = math.sin(angle), math.cos(angle)
    # The part of the straight grid that a turned window sees, and where in it the grid's middle is.
    view = (height, width)
    if angle:
        view = (
            math.ceil(height * abs(cos) + width * abs(sin)) + 2,
            math.ceil(width * abs(cos) + height * abs(sin)) + 2,
        )
    middle = (
        round(view[1] / 2 + cos * shift[0] + sin * shift[1]),
        round(view[0] / 2 - sin * shift[0] + cos * shift[1]),
    )
    canvas = blank(view, fill)
    boxes = []
    places = torch.randperm(4, generator=generator).tolist()
    for number, sample in zip(places, samples, strict=True):
        factor = min(full / side for full, side in zip(cell, sample.size, strict=True))
        tile = resize(sample, times(sample.size, factor))
        left = middle[0] - (0 if number % 2 else tile.size[1])
        top = middle[1] - (0 if number // 2 else tile.size[0])
        _paste(canvas, tile.image, top, left)
        boxes.append(tile.boxes + torch.tensor([left, top, left, top]))
    corners, labels = torch.cat(boxes), torch.cat([sample.labels for sample in samples])
    image = canvas
    if angle:
        # of the canvas, the point that a point of the window shows
        start = [
            middle[0] - cos * (width / 2 + shift[0]) - sin * (height / 2 + shift[1]),
            middle[1] + sin * (width / 2 + shift[0]) - cos * (height / 2 + shift[1]),
        ]
        image = _turned(canvas, (height, width), (cos, sin, start[0], -sin, cos, start[1]))
        corners = _turned_boxes(corners - torch.tensor(start * 2), cos, sin)
    inside = corners.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    kept = _areas(inside) >= _LEAST_SEEN * _areas(corners)
    mixed = clip_boxes(Sample(image, corners[kept], labels[kept], (height, width)))
    return replace(counted_as(mixed, samples[0].size), scaled=True)


def _paste(canvas: Tensor, tile: Tensor, top: int, left: int) -> None:
    """Put what fits of a tile on the canvas at a place that may be outside."""
    (_, height, width), (_, h, w) = canvas.shape, tile.shape
    y0, y1 = (min(max(edge, 0), height) for edge in (top, top + h))
    x0, x1 = (min(max(edge, 0), width) for edge in (left, left + w))
    if y0 < y1 and x0 < x1:
        canvas[:, y0:y1, x0:x1] = tile[:, y0 - top : y1 - top, x0 - left : x1 - left]


def _turned(image: Tensor, size: Size, coefficients: tuple[float, ...]) -> Tensor:
    """Return uint8 [3,H,W] of `size` whose point (x, y) shows (ax + by + c, dx + ey + f)."""
    stored = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return to_pixels(stored.transform(size[::-1], affine, coefficients, bilinear))


def _turned_boxes(boxes: Tensor, cos: float, sin: float) -> Tensor:
    """Return the boxes of the ellipses in `boxes` [K,4] xyxy, turned around the origin."""
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
    a, b = ((boxes[:, 2:] - boxes[:, :2]) / 2).unbind(1)
    centre = torch.stack([x * cos - y * sin, x * sin + y * cos], 1)
    half = torch.stack([torch.hypot(a * cos, b * sin), torch.hypot(a * sin, b * cos)], 1)
    return torch.cat([centre - half, centre + half], 1)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def mixup(sample: Sample, other: Sample, generator: torch.Generator) -> Sample:
    """Return the first image with the other blended into it, whole, with the boxes of both.

    Mixup of detectors (arXiv 1902.04103), without weights in the loss.
    """
    _, height, width = sample.image.shape
    small = resize(other, times(other.size, min(height / other.size[0], width / other.size[1])))
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


class Object(NamedTuple):
    """A box [4] xyxy in pixels of the image uint8 [3,H,W] that it is in, and its label."""

    image: Tensor
    box: Tensor
    label: Tensor


def copy_blend(
    sample: Sample,
    pool: Sequence[Object],
    generator: torch.Generator,
    below: tuple[float, float] = _PASTE_SHARE,
) -> Sample:
    """Paste three objects of `pool` (or all, if fewer) somewhere, half transparent.

    DEIMv2's CopyBlend. An object keeps its size in pixels, and comes with a margin of its
    surroundings, which its box leaves out. `below` bounds what share of a pixel stays below it.
    """
    image = sample.image.clone()
    _, height, width = image.shape
    pasted = []
    for number in torch.randperm(len(pool), generator=generator)[:_PASTED].tolist():
        source, box, _ = pool[number]
        x0, y0, x1, y1 = box.tolist()
        dx = draw_integer(-math.floor(x0), math.floor(width - x1), generator)
        dy = draw_integer(-math.floor(y0), math.floor(height - y1), generator)
        margin, share = draw_uniform(*_MARGIN, generator), draw_uniform(*below, generator)
        x, y = margin * (x1 - x0), margin * (y1 - y0)
        left, top = max(math.floor(x0 - x), 0, -dx), max(math.floor(y0 - y), 0, -dy)
        right = min(math.ceil(x1 + x), source.shape[2], width - dx)
        bottom = min(math.ceil(y1 + y), source.shape[1], height - dy)
        part = image[:, top + dy : bottom + dy, left + dx : right + dx]
        over = source[:, top:bottom, left:right]
        part.copy_(torch.lerp(over.float(), part.float(), share).round_())
        pasted.append((box + torch.tensor([dx, dy, dx, dy]), pool[number].label))
    if not pasted:
        return sample
    boxes, labels = (torch.stack(values) for values in zip(*pasted, strict=True))
    added = counted_as(Sample(image, boxes, labels, (height, width)), sample.size)
    return replace(
        sample,
        image=image,
        boxes=torch.cat([sample.boxes, added.boxes]),
        labels=torch.cat([sample.labels, labels]),
    )


def _objects(sample: Sample, partner: Partner, generator: torch.Generator) -> list[Object]:
    """Draw images until there are enough objects to paste into the sample, three at most."""
    found: list[Object] = []
    for _ in range(_PARTNERS):
        other = partner(generator)
        if other is not None:
            found += pastable(other, sample)
        if len(found) >= _PASTED:
            break
    return found


def pastable(source: Sample, target: Sample) -> list[Object]:
    """Return the objects of an image that are not tiny, and fit into another."""
    (_, height, width), (_, h, w) = target.image.shape, source.image.shape
    boxes = counted_as(source, (h, w)).boxes
    exact, room = boxes.double(), torch.tensor([width, height])
    fits = (exact[:, :2].floor() + (room - exact[:, 2:]).floor() >= 0).all(1)
    fits &= _areas(boxes) >= _SMALLEST_PASTED
    return [
        Object(source.image, box, label)
        for box, label in zip(boxes[fits], source.labels[fits], strict=True)
    ]
