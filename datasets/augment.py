"""Steps of strong augmentation: scale jitter, zoom-out and changes of colour."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from datasets.sample import Sample, Size, crop_anywhere, draw_integer, draw_uniform, resize

ZOOM_OUT = (0.35, 0.8)  # share of the canvas's sides that the image takes
_BRIGHTNESS, _CONTRAST, _SATURATION = (0.7, 1.3), (0.7, 1.3), (0.5, 1.5)
_HUE = 0.04  # of the colour circle, either way


def scale_jitter(
    sample: Sample, size: Size, factors: tuple[float, float], generator: torch.Generator
) -> Sample:
    """Resize to `size` times a factor drawn from `factors`, and cut what is more than `size`.

    Large-scale jitter (arXiv 2012.07177) without its padding: what is smaller stays so.
    """
    factor = draw_uniform(*factors, generator)
    scaled = resize(sample, _times(size, factor))
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
    image = pixels.adjust_brightness(image, draw_uniform(*_BRIGHTNESS, generator))
    image = pixels.adjust_contrast(image, draw_uniform(*_CONTRAST, generator))
    image = pixels.adjust_saturation(image, draw_uniform(*_SATURATION, generator))
    changed: Tensor = pixels.adjust_hue(image, draw_uniform(-_HUE, _HUE, generator))
    return changed


def _times(size: Size, factor: float) -> Size:
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width
