"""An image with its boxes, and the elementary steps that change both together.

Pixels stay 8-bit until `normalise`; tensors of them lie channels last in memory, which resizing
is vectorised for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

CHANNELS = 3
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Sample:
    """An image [3,h,w] RGB, uint8 until it is normalised, with boxes [K,4] xyxy and labels [K].

    Boxes are in pixels of `size`, the (height, width) that the image counts as; an image that
    was decoded at a fraction of it has fewer pixels until it is resized. `scaled` marks one whose
    scale was drawn at random when it was put together.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    size: Size
    scaled: bool = False


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [3,H,W], channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized_size(height: int, width: int, size: int, max_size: int | None) -> Size:
    """Return (height, width) with the short side at `size`, or less if the long one hits its bound.

    The long side is truncated and the bounded short side rounded, as the official code does:
    640x480 at 800/1333 becomes 1066x800, 1200x400 becomes 1332x444 (width x height). A strip that
    this would leave without a short side keeps one of 1.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
        if size == 0:
            return (max_size, 1) if width < height else (1, max_size)
    if short == size:
        return height, width
    other = int(size * long / short)
    return (other, size) if width < height else (size, other)


def resize(sample: Sample, size: Size, *, exact: bool = False) -> Sample:
    """Scale image and boxes to (height, width), bilinear and antialiased.

    `exact` takes Pillow's arithmetic, several times slower and a step of 8 bits apart at most.
    """
    image = sample.image
    if tuple(image.shape[-2:]) != size and exact:
        stored = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        image = to_pixels(stored.resize(size[::-1], Image.Resampling.BILINEAR))
    elif tuple(image.shape[-2:]) != size:
        image = pixels.resize(image, list(size), antialias=True)
    return counted_as(replace(sample, image=image), size)


def times(size: Size, factor: float) -> Size:
    """Return a (height, width) times `factor`, rounded, each at least 1."""
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def counted_as(sample: Sample, size: Size) -> Sample:
    """Return the same pixels with boxes in pixels of another size."""
    factor = torch.tensor([size[1] / sample.size[1], size[0] / sample.size[0]] * 2)
    return Sample(sample.image, sample.boxes * factor, sample.labels, size)


def flip(sample: Sample) -> Sample:
    """Mirror left and right."""
    x0, y0, x1, y1 = sample.boxes.unbind(-1)
    width = sample.size[1]
    boxes = torch.stack([width - x1, y0, width - x0, y1], dim=-1)
    return Sample(sample.image.flip(-1), boxes, sample.labels, sample.size)


def crop(sample: Sample, left: int, top: int, width: int, height: int) -> Sample:
    """Cut a rectangle out, clip the boxes to it and drop those without area."""
    whole = resize(sample, sample.size)
    image = whole.image[:, top : top + height, left : left + width]
    boxes = whole.boxes - torch.tensor([left, top, left, top], dtype=whole.boxes.dtype)
    return clip_boxes(Sample(image, boxes, whole.labels, (height, width)))


def random_crop(sample: Sample, sides: tuple[int, ...], generator: torch.Generator) -> Sample:
    """Cut a rectangle out whose sides are drawn between the two of `sides` (pixels).

    A side that is smaller than the minimum is kept whole.
    """
    low, high = sides
    width, height = (
        draw_integer(min(low, full), min(high, full), generator) for full in sample.size[::-1]
    )
    return crop_anywhere(sample, (height, width), generator)


def crop_anywhere(sample: Sample, size: Size, generator: torch.Generator) -> Sample:
    """Cut a rectangle of `size` out at a place that is drawn."""
    height, width = size
    left, top = (
        draw_integer(0, full - side, generator)
        for full, side in ((sample.size[1], width), (sample.size[0], height))
    )
    return crop(sample, left, top, width, height)


def mean_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """Return the 8-bit colour that is 0, as padding is, once it is normalised."""
    return tuple(round(255 * value) for value in mean)


def blank(size: Size, fill: Sequence[int]) -> Tensor:
    """Return uint8 [3,H,W] of one colour, channels last in memory."""
    image = torch.empty(*size, len(fill), dtype=torch.uint8).permute(2, 0, 1)
    return image.copy_(torch.tensor(fill, dtype=torch.uint8)[:, None, None])


def pad(sample: Sample, size: Size, fill: Sequence[int], place: tuple[int, int] = (0, 0)) -> Sample:
    """Put the image at `place`, (top, left), on a canvas of `size` in the colour `fill`."""
    if sample.size == size:
        return sample
    (height, width), (top, left) = sample.size, place
    canvas = blank(size, fill)
    canvas[:, top : top + height, left : left + width] = sample.image
    boxes = sample.boxes + torch.tensor([left, top, left, top], dtype=sample.boxes.dtype)
    return Sample(canvas, boxes, sample.labels, size)


def clip_boxes(sample: Sample) -> Sample:
    """Clip boxes to the image and drop those without area."""
    height, width = sample.size
    bounds = torch.tensor([width, height, width, height], dtype=sample.boxes.dtype)
    boxes = torch.minimum(sample.boxes.clamp(min=0), bounds)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Sample(sample.image, boxes[keep], sample.labels[keep], sample.size)


def normalise(
    sample: Sample, mean: Sequence[float], std: Sequence[float], *, exact: bool = False
) -> Sample:
    """Turn the image into a tensor in 0..1, less `mean`, over `std` (per channel).

    `exact` has the official order of operations, and so its last bits.
    """
    image = torch.empty(sample.image.shape, dtype=torch.float32)
    for plane, channel, m, s in zip(image, sample.image, mean, std, strict=True):
        # in place: a fresh tensor for each step costs more than the arithmetic
        plane.copy_(channel)
        if exact:
            plane.div_(255).sub_(m).div_(s)
        else:
            plane.mul_(1 / (255 * s)).sub_(m / s)
    return replace(sample, image=image)


def draw_chance(probability: float, generator: torch.Generator) -> bool:
    """Draw a number and return whether it is below `probability`."""
    return float(torch.rand((), generator=generator)) < probability


def draw_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number in low..high."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def draw_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Draw a whole number in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
