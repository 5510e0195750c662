"""A fixed set of validation images with predictions beside the ground truth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from util.draw import draw_boxes, side_by_side


def evenly_spaced(ids: Sequence[int], count: int) -> list[int]:
    """Return `count` ids spread over the whole list, the same ones every time."""
    if count >= len(ids):
        return list(ids)
    return [ids[i * len(ids) // count] for i in range(count)]


def draw_gallery(
    detections: Sequence[Mapping[str, Any]],
    coco_gt: COCO,
    image_ids: Sequence[int],
    read_image: Callable[[int], Image.Image | None],
    *,
    score_threshold: float | None = 0.3,
) -> dict[str, Image.Image]:
    """Draw what was found above a score beside what is there, one image per image.

    `detections` are COCO results of any images; None for the threshold draws all of them. A
    image that cannot be read is left out.
    """
    wanted = set(image_ids)
    found: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in image_ids}
    for detection in detections:
        good = score_threshold is None or detection["score"] >= score_threshold
        if good and detection["image_id"] in wanted:
            found[detection["image_id"]].append(detection)
    title = "predictions" + ("" if score_threshold is None else f", score >= {score_threshold}")
    drawn = {}
    for image_id in image_ids:
        image = read_image(image_id)
        if image is None:
            continue
        scores = [float(d["score"]) for d in found[image_id]]
        left = draw_boxes(image, *_boxes(found[image_id], coco_gt), scores)
        right = draw_boxes(image, *_boxes(coco_gt.imgToAnns[image_id], coco_gt))
        drawn[f"image_{image_id}"] = side_by_side(left, right, (title, "ground truth"))
    return drawn


def _boxes(
    annotations: Sequence[Mapping[str, Any]], coco_gt: COCO
) -> tuple[Tensor, list[int], list[str]]:
    """Return corners [K,4], colour labels and names of COCO annotations or results."""
    xywh = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
    order = {category: label for label, category in enumerate(sorted(coco_gt.cats))}
    categories = [a["category_id"] for a in annotations]
    names = [str(coco_gt.cats[c]["name"]) for c in categories]
    return corners, [order[c] for c in categories], names
