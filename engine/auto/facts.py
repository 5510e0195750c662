"""What a plan has to know of a data set."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from datasets.index import CocoIndex
from util.errors import DataError

_SMALL, _LARGE = 0.1, 0.9  # quantiles of box sides
_ASPECT = 0.95  # quantile of images' long sides over their short ones
_ASPECTS = (4 / 3, 2.0)  # minimum and maximum that a plan allows for
_LOOKED_AT = 500  # images, for overlaps: they cost the square of the boxes
_MOST_COMPARED = 500  # boxes of each
OVERLAP = 0.7  # IoU from which boxes of one class overlap: NMS would remove one of them


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Sizes and counts of a training set, and how many images validate.

    The side of a box is the square root of its area. `small` and `large` are the 10th and 90th
    percentile of sides, and `area` the mean area of an image, where images are resized so that the
    short side is 1 and the long side at most `aspect`. `short_side` is the median one, in pixels.
    `overlapping` is the part of the boxes that overlap another of their class by more than 0.7.
    """

    images: int
    val_images: int
    boxes: int
    most_boxes: int  # in an image
    short_side: float
    aspect: float
    area: float
    small: float
    large: float
    overlapping: float


def facts_of(train: CocoIndex, val: CocoIndex) -> Facts:
    """Read off the checked indices of a run.

    Raises:
        DataError: no image with boxes has a known size.
    """
    sizes = train.images.sizes.astype(np.float64)
    known: NDArray[np.bool_] = np.asarray(sizes.all(axis=1))
    image_of_box = np.repeat(np.arange(len(train)), train.boxes_per_image)
    if not known[image_of_box].any():
        raise DataError(f"{train.place}: no image with boxes has a known size. Use another file.")
    short, long = sizes[known].min(axis=1), sizes[known].max(axis=1)
    aspect = float(np.clip(np.quantile(long / short, _ASPECT), *_ASPECTS))
    scale = np.zeros(len(train))
    scale[known] = np.minimum(1 / short, aspect / long)
    width_height = (train.boxes[:, 2:] - train.boxes[:, :2]).astype(np.float64)
    sides = np.sqrt(width_height.prod(axis=1)) * scale[image_of_box]
    small, large = np.quantile(sides[known[image_of_box]], (_SMALL, _LARGE)).tolist()
    return Facts(
        images=len(train),
        val_images=len(val),
        boxes=len(train.boxes),
        most_boxes=int(train.boxes_per_image.max()),
        short_side=float(np.median(short)),
        aspect=aspect,
        area=float((sizes[known].prod(axis=1) * scale[known] ** 2).mean()),
        small=small,
        large=large,
        overlapping=overlapping(train),
    )


def overlapping(index: CocoIndex) -> float:
    """Return the part of the boxes that overlap another of their image and class."""
    images = np.flatnonzero(index.boxes_per_image)
    looked_at = images[np.linspace(0, len(images) - 1, min(len(images), _LOOKED_AT)).astype(int)]
    counts = [
        _overlapping(index.boxes[part][:_MOST_COMPARED], index.labels[part][:_MOST_COMPARED])
        for part in (slice(index.first[i], index.first[i + 1]) for i in looked_at)
    ]
    found, of = np.sum(counts, axis=0)
    return float(found / of)


def _overlapping(boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[int, int]:
    """Return how many boxes overlap another of their class, and how many there are."""
    iou = box_iou(torch.from_numpy(boxes.copy()), torch.from_numpy(boxes.copy())).numpy()
    np.fill_diagonal(iou, 0)
    return int(((iou > OVERLAP) & (labels[:, None] == labels)).any(axis=1).sum()), len(boxes)
