"""AP by the number of objects in an image, and the images where most is lost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.evaluation.matching import AREA_RANGES, Bools, Detected, Truth, accumulate, match
from engine.evaluation.outcomes import Outcomes

CROWDING = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, None))


@dataclass(frozen=True)
class ByCount:
    """AP (0..1, None without ground truth) over the images with so many objects."""

    objects: str
    images: int
    AP: float | None
    AP50: float | None


def by_number_of_objects(truth: Truth, detected: Detected, *, max_dets: int) -> list[ByCount]:
    """Return AP over images with 1, 2-3, 4-7, ... objects; crowds do not count."""
    objects = np.bincount(truth.image[~truth.crowd], minlength=len(truth.image_ids))
    rows = []
    for low, high in CROWDING:
        chosen = (objects >= low) & (objects <= (high or objects.max(initial=0)))
        if not chosen.any():
            continue
        part = detected.select(chosen[detected.image])
        AP, AP50 = _ap(_of_images(truth, chosen), part, max_dets)
        name = str(low) if low == high else f"{low}-{high}" if high else f"{low} or more"
        rows.append(ByCount(name, int(chosen.sum()), AP, AP50))
    return rows


def _of_images(truth: Truth, chosen: Bools) -> Truth:
    keep = chosen[truth.image]
    return replace(
        truth,
        image=truth.image[keep],
        category=truth.category[keep],
        box=truth.box[keep],
        area=truth.area[keep],
        crowd=truth.crowd[keep],
    )


def _ap(truth: Truth, detected: Detected, max_dets: int) -> tuple[float | None, float | None]:
    ranges = AREA_RANGES[:1]
    matches = match(truth, detected, area_ranges=ranges, max_dets=max_dets)
    precision = accumulate(truth, detected, matches, area_ranges=ranges).precision
    valid = precision > -1
    if not valid.any():
        return None, None
    return float(precision[valid].mean()), float(precision[0][valid[0]].mean())


@dataclass(frozen=True)
class WorstImage:
    """What went wrong in an image, at each class's best threshold; `lost` is in scores."""

    image_id: int
    file_name: str
    lost: float
    objects: int
    missed: int
    false_alarms: int


def worst_images(
    truth: Truth, found: Outcomes, above: Bools, file_names: Mapping[int, str], count: int
) -> list[WorstImage]:
    """Return the images that lose the most score, worst first.

    An object loses 1 less the score it was found with, whatever that is; a false alarm above
    the threshold loses its score.
    """
    images = len(truth.image_ids)
    image, score, hit = found.detected.image, found.detected.score, found.hit
    won = np.bincount(image[hit], weights=np.minimum(score[hit], 1.0), minlength=images)
    alarm = above & ~hit
    lost_to_alarms = np.bincount(image[alarm], weights=score[alarm], minlength=images)
    objects = np.bincount(truth.image[~truth.crowd], minlength=images)
    right = np.bincount(image[hit & above], minlength=images)
    alarms = np.bincount(image[alarm], minlength=images)
    lost = objects - won + lost_to_alarms
    order = np.argsort(-lost, kind="stable")[:count]
    return [
        WorstImage(
            image_id=(image_id := int(truth.image_ids[i])),
            file_name=file_names.get(image_id, ""),
            lost=float(lost[i]),
            objects=int(objects[i]),
            missed=int(objects[i] - right[i]),
            false_alarms=int(alarms[i]),
        )
        for i in order
        if lost[i] > 0
    ]
