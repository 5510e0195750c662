"""A fixed set of validation images with predictions beside the ground truth."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from engine.evaluation.matching import Detections, Truth
from util.draw import draw_boxes, side_by_side

ReadImage = Callable[[int], Image.Image | None]  # by image id; None if it cannot be read


def evenly_spaced(ids: Sequence[int], count: int) -> list[int]:
    """Return `count` ids spread over the whole list, the same ones every time."""
    count = min(count, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


def draw_gallery(
    detections: Detections,
    truth: Truth,
    image_ids: Sequence[int],
    read_image: ReadImage,
    *,
    score_threshold: float | None = 0.3,
) -> dict[int, Image.Image]:
    """Draw, by image id, the detections from a score on beside the ground truth.

    None for the threshold draws all of them. An image that cannot be read is left out.
    """
    title = "predictions"
    if score_threshold is not None:
        detections = detections.select(detections.score >= score_threshold)
        title += f", score >= {score_threshold}"
    drawn = {}
    for image_id in image_ids:
        image = read_image(image_id)
        if image is None:
            continue
        position = int(np.searchsorted(truth.image_ids, image_id))
        left, right = (
            _draw(image, boxes.select(boxes.image == position), truth.class_names)
            for boxes in (detections, truth)
        )
        drawn[image_id] = side_by_side(left, right, (title, "ground truth"))
    return drawn


def _draw(image: Image.Image, boxes: Detections | Truth, class_names: Sequence[str]) -> Image.Image:
    corners = torch.from_numpy(np.hstack([boxes.box[:, :2], boxes.box[:, :2] + boxes.box[:, 2:]]))
    labels = boxes.category.tolist()
    scores = boxes.score.tolist() if isinstance(boxes, Detections) else None
    return draw_boxes(image, corners, labels, [class_names[label] for label in labels], scores)
