"""COCO's matching of detections to ground truth, for all images at once, in NumPy.

The rules, and every rounding, are those of pycocotools' COCOeval. Legend: D detections, G
annotations, A area ranges, T IoU thresholds, N detections that count, C of them that overlap an
annotation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Names
from datasets.index import CocoIndex

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0.0, 1.0, 101)
AREA_RANGES: Floats = np.array(
    [[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]], dtype=np.float64
)  # all, small, medium, large; square pixels
_PAIRS_PER_CHUNK = 1 << 20
_CROWDED = 256  # annotations of a detection's image and category; beyond, most are far from it


@dataclass(frozen=True, eq=False)
class Truth:
    """What a data set says is in its images.

    Shape: image_ids [I] and category_ids [K], ascending, with file_names [I], sizes [I,2] (height,
    width; 0 where unknown) and class_names [K]. Annotations in the file's order: image and category
    [G], positions in those; box [G,4] as (x, y, w, h) in pixels; area [G]; crowd [G].
    """

    image_ids: Ints
    file_names: Sequence[str] | Names
    sizes: Ints
    category_ids: Ints
    class_names: Sequence[str]
    image: Ints
    category: Ints
    box: Floats
    area: Floats
    crowd: Bools
    image_texts: Mapping[int, str] = field(default_factory=dict)  # ids that the file has as text
    category_texts: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, index: CocoIndex) -> "Truth":
        """Order a checked split by image id."""
        images, annotations = index.images, index.annotations
        order = np.argsort(images.ids)
        position = np.argsort(order)
        return cls(
            image_ids=images.ids[order],
            file_names=Names.of(images.file_names[i] for i in order),
            sizes=images.sizes[order],
            category_ids=np.array(index.classes.ids, dtype=np.int64),
            class_names=index.classes.names,
            image=position[annotations.image],
            category=annotations.labels,
            box=annotations.xywh,
            area=annotations.area,
            crowd=annotations.crowd,
            image_texts=images.texts,
            category_texts={
                number: text
                for number, text in zip(index.classes.ids, index.classes.texts, strict=False)
                if text
            },
        )

    def select(self, keep: Bools) -> "Truth":
        """Return the same images and categories with some of the annotations."""
        names = ("image", "category", "box", "area", "crowd")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes that a model found.

    Shape: image, category [D], positions in the `image_ids` and `category_ids` of a `Truth`; box
    [D,4] as (x, y, w, h) in pixels; score [D].
    """

    image: Ints
    category: Ints
    box: Floats
    score: Floats

    def __len__(self) -> int:
        return len(self.score)

    def select(self, keep: Bools | Ints) -> "Detections":
        """Return some of them."""
        return Detections(*(getattr(self, f.name)[keep] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Iterable["Detections"]) -> "Detections":
        """Return those of all parts."""
        empty = cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
        parts = [empty, *parts]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def to_coco(self, truth: Truth) -> list[dict[str, Any]]:
        """Return them in the COCO results format, with ids as the file of the truth has them."""
        image, category = truth.image_ids[self.image], truth.category_ids[self.category]
        images, categories = truth.image_texts, truth.category_texts
        return [
            {
                "image_id": images.get(i, i),
                "category_id": categories.get(c, c),
                "bbox": box,
                "score": score,
            }
            for i, c, box, score in zip(
                *(column.tolist() for column in (image, category, self.box, self.score)),
                strict=True,
            )
        ]


@dataclass(frozen=True)
class MatchedDetections:
    """Which detection found which annotation.

    Shape: order [N], the detections that count, by category and then by falling score; rank [N]
    in its image and category; candidate [C], positions in `order` of those that overlap anything;
    gt [C,A,T], the annotation found or -1; ignored [G,A], annotations that neither count as missed
    nor make a false alarm of what finds them.
    """

    order: Ints
    rank: Ints
    candidate: Ints
    gt: Ints
    ignored: Bools


def match(
    truth: Truth,
    detections: Detections,
    *,
    iou_thresholds: Floats = IOU_THRESHOLDS,
    area_ranges: Floats = AREA_RANGES,
    max_dets: int = 100,
) -> MatchedDetections:
    """Match the best `max_dets` detections of each image and category to its annotations."""
    outside = (truth.area[:, None] < area_ranges[:, 0]) | (truth.area[:, None] > area_ranges[:, 1])
    ignored = truth.crowd[:, None] | outside
    pair = _pair(truth, detections)
    order = np.lexsort((-detections.score, pair))
    rank = np.arange(len(order)) - np.searchsorted(pair[order], pair[order])
    order, rank = order[rank < max_dets], rank[rank < max_dets]
    # COCO's order: by category and score, of equal scores by image, then as they were given
    again = np.lexsort(
        (detections.image[order], -detections.score[order], detections.category[order])
    )
    order, rank = order[again], rank[again]
    row, gt, iou = overlaps(truth, detections.select(order), float(iou_thresholds.min()))
    candidate, edge_of = np.unique(row, return_inverse=True)
    thresholds = np.minimum(iou_thresholds, 1 - 1e-10)
    matched = _match_in_rounds(rank[candidate], edge_of, gt, iou, ignored, truth.crowd, thresholds)
    return MatchedDetections(order, rank, candidate, matched, ignored)


def _pair(truth: Truth, boxes: Truth | Detections) -> Ints:
    """Return a number for the image and category of each box."""
    return np.asarray(boxes.image * len(truth.category_ids) + boxes.category)


def overlaps(
    truth: Truth, detections: Detections, min_iou: float, *, any_category: bool = False
) -> tuple[Ints, Ints, Floats]:
    """Return detection, annotation and IoU [E] of all pairs in an image with an IoU of `min_iou`.

    They share the category too, unless `any_category`. The IoU with a crowd is the part of the
    detection inside it.
    """
    gt_key, dt_key = (
        boxes.image if any_category else _pair(truth, boxes) for boxes in (truth, detections)
    )
    threshold = min(min_iou, 1 - 1e-10)
    by_key = np.argsort(gt_key, kind="stable")
    first = np.searchsorted(gt_key[by_key], dt_key)
    count = np.searchsorted(gt_key[by_key], dt_key, side="right") - first
    crowded = count > _CROWDED
    candidates = [(by_key, np.where(crowded, 0, first), np.where(crowded, 0, count))]
    if crowded.any():
        candidates += _candidates_by_width(truth, detections, gt_key, dt_key, crowded, threshold)
    found: list[tuple[Ints, Ints, Floats]] = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for annotations, start, number in candidates:
        rows = np.flatnonzero(number)
        parts = np.searchsorted(
            np.cumsum(number[rows]), np.arange(_PAIRS_PER_CHUNK, number.sum(), _PAIRS_PER_CHUNK)
        )
        for part in np.split(rows, parts):
            row = np.repeat(part, number[part])
            before = np.repeat(np.cumsum(number[part]) - number[part], number[part])
            gt = annotations[start[row] + np.arange(len(row)) - before]
            iou = box_iou(detections.box[row], truth.box[gt], truth.crowd[gt])
            keep = iou >= threshold
            found.append((row[keep], gt[keep], iou[keep]))
    row, gt, iou = (np.concatenate(column) for column in zip(*found, strict=True))
    if crowded.any():
        order = np.lexsort((gt, row))
        row, gt, iou = row[order], gt[order], iou[order]
    return row, gt, iou


def _candidates_by_width(
    truth: Truth,
    detections: Detections,
    gt_key: Ints,
    dt_key: Ints,
    chosen: Bools,
    min_iou: float,
) -> list[tuple[Ints, Ints, Ints]]:
    """Return, for some detections, the annotations with their key that could overlap enough.

    Of boxes that share a part t of their union, each is at least t as wide as the other, and they
    share as much of the horizontal axis. Annotations of about the same width are sorted by their
    left sides, so that those are next to each other.

    Returns for each width: annotations, and where those of each detection start and how many [D].
    """
    left, width = truth.box[:, 0], truth.box[:, 2]
    dt_left, dt_width = detections.box[:, 0], detections.box[:, 2]
    slack = 1e-6 * (1 + np.abs(dt_left) + dt_width)  # for the rounding of either side
    used = np.isin(gt_key, dt_key[chosen])
    octave = np.floor(np.log2(np.maximum(width, 1e-6)))
    result = []
    for power in np.unique(octave[used]):
        here = np.flatnonzero(used & (octave == power))
        lefts = np.sort(left[here])
        # a place in the order by key and left side, as one number
        place = gt_key[here] * (len(here) + 1) + np.searchsorted(lefts, left[here])
        by_place = np.argsort(place, kind="stable")
        widest = float(width[here].max())
        fits = chosen & (widest >= min_iou * dt_width - slack)
        if not truth.crowd[here].any():  # a crowd may be of any size
            fits &= dt_width >= min_iou * float(width[here].min()) - slack
        ends = (dt_left - widest - slack, dt_left + dt_width + slack)
        start, end = (
            np.searchsorted(
                place[by_place], dt_key * (len(here) + 1) + np.searchsorted(lefts, edge)
            )
            for edge in ends
        )
        result.append((here[by_place], start, np.where(fits, end - start, 0)))
    return result


def box_iou(dt: Floats, gt: Floats, crowd: Bools) -> Floats:
    """Return the IoU of boxes [E,4] (x, y, w, h) one by one, by pycocotools' arithmetic."""
    width = np.minimum(dt[:, 2] + dt[:, 0], gt[:, 2] + gt[:, 0]) - np.maximum(dt[:, 0], gt[:, 0])
    height = np.minimum(dt[:, 3] + dt[:, 1], gt[:, 3] + gt[:, 1]) - np.maximum(dt[:, 1], gt[:, 1])
    shared, area = width * height, dt[:, 2] * dt[:, 3]
    union = np.where(crowd, area, area + gt[:, 2] * gt[:, 3] - shared)
    meet = (width > 0) & (height > 0)
    return np.asarray(np.divide(shared, union, out=np.zeros(len(dt)), where=meet))


def _match_in_rounds(
    rank: Ints,
    candidate: Ints,
    gt: Ints,
    iou: Floats,
    ignored: Bools,
    crowd: Bools,
    thresholds: Floats,
) -> Ints:
    """Return the annotation found by each candidate [C,A,T], -1 where none.

    Images and categories are independent of each other, so the best candidates of all choose at
    once, then the second-best ones, and so on.

    Shape: rank [C]; candidate, gt and iou [E] of pairs that overlap.
    """
    matched = np.full((len(rank), ignored.shape[1], len(thresholds)), -1, dtype=np.int64)
    taken = np.zeros((len(ignored), ignored.shape[1], len(thresholds)), dtype=np.bool_)
    # of equal overlaps the later annotation wins, so the last edge of a candidate is its best
    order = np.lexsort((gt, iou, candidate, rank[candidate]))
    rounds = np.split(order, np.flatnonzero(np.diff(rank[candidate[order]])) + 1)
    for edge in rounds if len(order) else ():
        free = ~taken[gt[edge]] | crowd[gt[edge]][:, None, None]
        free &= (iou[edge][:, None] >= thresholds)[:, None]
        # key: 0 nothing; 1.. an ignored annotation; beyond all of them one that counts
        key = np.arange(1, len(edge) + 1)[:, None] + np.where(ignored[gt[edge]], 0, len(edge))
        chooser, first = np.unique(candidate[edge], return_index=True)
        best = np.maximum.reduceat(np.where(free, key[:, :, None], 0), first, axis=0)
        which, area, threshold = np.nonzero(best)
        chosen = gt[edge][(best[which, area, threshold] - 1) % len(edge)]
        matched[chooser[which], area, threshold] = chosen
        taken[chosen, area, threshold] = True
    return matched


def precision_at_recalls(true: Ints, false: Ints, positives: int) -> Floats:
    """Return the precision at `RECALLS` [101], 0 where that is not reached.

    `true` and `false` [P] count the detections up to and with each that found something, by
    falling score. The precision is the best at this recall or beyond.
    """
    precision = true / (false + true + np.spacing(1))
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return np.asarray(best[np.searchsorted(true / positives, RECALLS, side="left")])


def accumulate(
    truth: Truth,
    detections: Detections,
    *,
    area_ranges: Floats = AREA_RANGES,
    max_dets: int = 100,
) -> tuple[Floats, Floats]:
    """Match; return precision [T,R,K,A] and recall [T,K,A,M] as COCOeval does; -1: nothing to find.

    Precision is that of all detections that count, the best `max_dets` of each image and category;
    recall is that of the best 1, 10 and all.
    """
    matches = match(truth, detections, area_ranges=area_ranges, max_dets=max_dets)
    num_areas, num_thresholds = matches.gt.shape[1:]
    categories = np.arange(len(truth.category_ids) + 1)
    precision = np.full((num_thresholds, len(RECALLS), len(categories) - 1, num_areas), -1.0)
    recall = np.full((num_thresholds, len(categories) - 1, num_areas, 3), -1.0)
    bounds = np.searchsorted(detections.category[matches.order], categories)
    candidates = np.searchsorted(matches.candidate, bounds)
    area = detections.box[matches.order, 2] * detections.box[matches.order, 3]
    rank = matches.rank[matches.candidate]
    for a, (low, high) in enumerate(area_ranges):
        positives = np.bincount(
            truth.category[~matches.ignored[:, a]], minlength=len(categories) - 1
        )
        inside = (area >= low) & (area <= high)
        for k in np.flatnonzero(positives):
            part = slice(candidates[k], candidates[k + 1])
            here = matches.candidate[part]
            inside_so_far = np.cumsum(inside[bounds[k] : bounds[k + 1]])[here - bounds[k]]
            for t in range(num_thresholds):
                gt = matches.gt[part, a, t]
                hit = (gt >= 0) & ~matches.ignored[gt, a]
                # false: of this size, and found nothing, not even what is ignored
                false = inside_so_far - np.cumsum(inside[here] & (gt >= 0))
                precision[t, :, k, a] = precision_at_recalls(
                    np.cumsum(hit)[hit], false[hit], positives[k]
                )
                recall[t, k, a] = [
                    (rank[part][hit] < best).sum() / positives[k] for best in (1, 10, max_dets)
                ]
    return precision, recall
