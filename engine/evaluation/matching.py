"""COCO's matching of detections to ground truth, for all images at once, in NumPy.

The rules, and every rounding, are those of pycocotools' COCOeval. Legend: D detections, G
annotations, A area ranges, T IoU thresholds, N detections that count, F times that one of them
found an annotation, C detections of a class that found any.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Names
from datasets.index import CocoIndex

Ints = NDArray[np.signedinteger[Any]]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Bits = NDArray[np.uint64]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0.0, 1.0, 101)
AREA_RANGES: Floats = np.array(
    [[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]], dtype=np.float64
)  # all, small, medium, large; square pixels
_PAIRS_PER_CHUNK = 1 << 20
_COMPARED_AT_ONCE = 1 << 17  # detections
_DETECTIONS_AT_ONCE = 1 << 20
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

    def select(self, keep: Bools | Ints | slice) -> "Truth":
        """Return the same images and categories with some of the annotations."""
        names = ("image", "category", "box", "area", "crowd")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes that a model found.

    Shape: image, category [D], positions in the `image_ids` and `category_ids` of a `Truth`; box
    [D,4] as (x, y, w, h) in pixels; score [D]. There can be many of them, so that positions may be
    of 32 bits, and scores too if the model's are.
    """

    image: Ints
    category: Ints
    box: Floats
    score: NDArray[np.floating[Any]]

    def __len__(self) -> int:
        return len(self.score)

    def select(self, keep: Bools | Ints | slice) -> "Detections":
        """Return some of them."""
        return Detections(*(getattr(self, f.name)[keep] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Iterable["Detections"]) -> "Detections":
        """Return those of all parts."""
        empty = cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
        parts = list(parts) or [empty]
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
    in its image and category; row [F], ascending, positions in `order` of those that found
    something; gt [F], the annotation; where [F], the area ranges and thresholds at which they did;
    ignored [G], where annotations neither count as missed nor make a false alarm of what finds
    them. `where` and `ignored` have bit a * T + t for area range a and threshold t.
    """

    order: Ints
    rank: Ints
    row: Ints
    gt: Ints
    where: Bits
    ignored: Bits


def match(
    truth: Truth,
    detections: Detections,
    *,
    iou_thresholds: Floats = IOU_THRESHOLDS,
    area_ranges: Floats = AREA_RANGES,
    max_dets: int = 100,
) -> MatchedDetections:
    """Match the best `max_dets` detections of each image and category to its annotations.

    Area ranges times thresholds are 64 at most.
    """
    # COCO's order: by falling score, of equal scores by image, then as they were given
    place = _places_by_score(detections)
    pair = _pair(truth, detections)
    by_pair = _sorted_by(pair, place)
    first = _first_of_runs(pair[by_pair])
    rank_by_pair = np.arange(len(pair)) - np.repeat(first, np.diff(first, append=len(pair)))
    counting = rank_by_pair < max_dets
    rank = np.empty_like(place)
    rank[by_pair] = rank_by_pair
    kept = np.flatnonzero(rank < max_dets)
    order = kept[_sorted_by(detections.category[kept], place[kept])]
    place[order] = np.arange(len(order))  # now that in `order`

    annotated = np.isin(pair[by_pair[first]], _pair(truth, truth))
    near = by_pair[np.repeat(annotated, np.diff(first, append=len(pair))) & counting]
    row, gt, iou = overlaps(truth, detections.select(near), float(iou_thresholds.min()))
    row = place[near[row]]

    outside = (truth.area[:, None] < area_ranges[:, 0]) | (truth.area[:, None] > area_ranges[:, 1])
    thresholds = np.minimum(iou_thresholds, 1 - 1e-10)
    ignored = _bits(np.repeat(truth.crowd[:, None] | outside, len(thresholds), axis=1))
    enough = _bits(np.tile(iou[:, None] >= thresholds, len(area_ranges)))
    where = _match_in_rounds(rank[order[row]], row, gt, iou, enough, ignored, truth.crowd)
    found = np.flatnonzero(where)
    found = found[np.argsort(row[found], kind="stable")]
    return MatchedDetections(order, rank[order], row[found], gt[found], where[found], ignored)


def _bits(values: Bools) -> Bits:
    """Return truth values [N,B] as a number each [N]; the first is the lowest bit."""
    bits = np.zeros(len(values), dtype=np.uint64)
    for i, column in enumerate(values.T):
        bits |= column.astype(np.uint64) << np.uint64(i)
    return bits


def _places_by_score(detections: Detections) -> Ints:
    """Return the place [D] of each by falling score; equal scores by image, then as given."""
    score = -detections.score
    order = np.argsort(score)  # in any order where equal, which is several times as fast
    tied = np.append(False, score[order[1:]] == score[order[:-1]])
    if tied.any():
        rows = np.flatnonzero(tied | np.append(tied[1:], False))
        chosen = order[rows]
        run = np.cumsum(~tied)[rows]
        order[rows] = chosen[np.lexsort((chosen, detections.image[chosen], run))]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place


def _sorted_by(number: Ints, place: Ints) -> Ints:
    """Return positions [N] by number, of equal numbers by place; both not negative."""
    bits = int(place.max(initial=0)).bit_length()
    if int(number.max(initial=0)).bit_length() + bits > 62:
        return np.lexsort((place, number))
    at = np.empty(int(place.max(initial=-1)) + 1, dtype=np.int64)
    at[place] = np.arange(len(place))
    both = np.left_shift(number, bits, dtype=np.int64) | place
    return np.asarray(at[np.sort(both) & ((1 << bits) - 1)])


def _first_of_runs(values: Ints) -> Ints:
    """Return where each run of equal values [N] begins."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])


def _pair(truth: Truth, boxes: Truth | Detections) -> Ints:
    """Return a number for the image and category of each box."""
    first = np.multiply(boxes.image, len(truth.category_ids), dtype=np.int64)
    return np.asarray(first + boxes.category)


def overlaps(
    truth: Truth, detections: Detections, min_iou: float, *, any_category: bool = False
) -> tuple[Ints, Ints, Floats]:
    """Return detection, annotation and IoU [E] of all pairs in an image with an IoU of `min_iou`.

    They share the category too, unless `any_category`. The IoU with a crowd is the part of the
    detection inside it.
    """
    gt_key = truth.image if any_category else _pair(truth, truth)
    by_key = np.argsort(gt_key, kind="stable")
    found = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for start in range(0, len(detections), _COMPARED_AT_ONCE):  # each needs some 100 bytes
        part = detections.select(slice(start, start + _COMPARED_AT_ONCE))
        dt_key = part.image.astype(np.int64) if any_category else _pair(truth, part)
        row, gt, iou = _overlaps(truth, part, gt_key, dt_key, by_key, min(min_iou, 1 - 1e-10))
        found.append((row + start, gt, iou))
    row, gt, iou = (np.concatenate(column) for column in zip(*found, strict=True))
    return row, gt, iou


def _overlaps(
    truth: Truth,
    detections: Detections,
    gt_key: Ints,
    dt_key: Ints,
    by_key: Ints,
    min_iou: float,
) -> tuple[Ints, Ints, Floats]:
    """Return what `overlaps` does, of boxes that can overlap where their keys are equal.

    `by_key` are the annotations in the order of theirs.
    """
    first = np.searchsorted(gt_key[by_key], dt_key)
    count = np.searchsorted(gt_key[by_key], dt_key, side="right") - first
    crowded = count > _CROWDED
    candidates = [(by_key, np.where(crowded, 0, first), np.where(crowded, 0, count))]
    if crowded.any():
        candidates += _candidates_by_width(truth, detections, gt_key, dt_key, crowded, min_iou)
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
            keep = iou >= min_iou
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
    row: Ints,
    gt: Ints,
    iou: Floats,
    enough: Bits,
    ignored: Bits,
    crowd: Bools,
) -> Bits:
    """Return where each pair of a detection and an annotation is a match [E].

    Images and categories are independent of each other, so the best detections of all choose at
    once, then the second-best ones, and so on.

    Shape: of pairs, by detection: rank, row, gt, iou and where that is `enough` [E]; of
    annotations: ignored, crowd [G].
    """
    where, taken = np.zeros_like(enough), np.zeros_like(ignored)
    last = np.append(row[1:] != row[:-1], True)[: len(row)]
    alone = last & np.append(True, last[:-1])[: len(row)]
    once = np.where(crowd, np.uint64(0), ~np.uint64(0))  # others can be found once
    single = np.flatnonzero(alone)
    # of equal overlaps the later annotation wins, so the last pair of a detection is its best
    several = np.flatnonzero(~alone)
    several = several[np.lexsort((gt[several], iou[several], row[several], rank[several]))]
    single = single[np.argsort(rank[single], kind="stable")]
    rounds = np.arange(1, int(rank.max(initial=0)) + 1)
    of_single = np.split(single, np.searchsorted(rank[single], rounds))
    of_several = np.split(several, np.searchsorted(rank[several], rounds))
    for pairs, more in zip(of_single, of_several, strict=True):
        where[pairs] = enough[pairs] & ~taken[gt[pairs]]
        taken[gt[pairs]] |= where[pairs] & once[gt[pairs]]
        if len(more):
            _choose(more, row, gt, enough, ignored, taken, where)
            taken[gt[more]] |= where[more] & once[gt[more]]
    return where


def _choose(
    pairs: Ints, row: Ints, gt: Ints, enough: Bits, ignored: Bits, taken: Bits, where: Bits
) -> None:
    """Set `where` of the pairs of a round, in which each detection has several, the best last."""
    first = _first_of_runs(row[pairs])
    number = np.diff(first, append=len(pairs))
    free = enough[pairs] & ~taken[gt[pairs]]
    found = np.zeros(len(first), dtype=np.uint64)
    result = np.zeros(len(pairs), dtype=np.uint64)
    # an annotation that is ignored is found only where none that counts is
    for wanted in (~ignored[gt[pairs]], ignored[gt[pairs]]):
        for step in range(1, int(number.max()) + 1):
            choosing = np.flatnonzero(number >= step)
            pair = first[choosing] + number[choosing] - step
            chosen = free[pair] & wanted[pair] & ~found[choosing]
            found[choosing] |= chosen
            result[pair] |= chosen
    where[pairs] = result


def precision_at_recalls(hit: Bools, false: Ints, positives: int) -> Floats:
    """Return the precision at `RECALLS` [T,101], 0 where that is not reached.

    Of detections by falling score, `hit` [C,T] are right, and `false` [C,T] counts those up to each
    that are wrong. The precision is the best at this recall or beyond.
    """
    column, row = np.nonzero(hit.T)
    total = hit.sum(axis=0)
    true = np.arange(1, len(row) + 1) - np.repeat(np.cumsum(total) - total, total)
    precision = true / (false[row, column] + true + np.spacing(1))
    best = np.zeros((len(total), int(total.max(initial=0)) + 1))
    best[column, true - 1] = precision
    best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(np.arange(1, positives + 1) / positives, RECALLS, side="left")
    return best[:, np.minimum(reached, best.shape[1] - 1)]


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
    num_classes, num_areas = len(truth.category_ids), len(area_ranges)
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), num_classes, num_areas), -1.0)
    recall = np.full((len(IOU_THRESHOLDS), num_classes, num_areas, 3), -1.0)
    for classes, annotations, rows in in_parts(truth, detections):
        part = truth.select(annotations), detections.select(rows)
        _accumulate(*part, classes, area_ranges, max_dets, precision, recall)
    return precision, recall


def in_parts(
    truth: Truth, detections: Detections
) -> Iterator[tuple[range, Ints | slice, Ints | slice]]:
    """Yield categories to be matched at once; where their annotations and detections are."""
    counts = np.bincount(detections.category, minlength=len(truth.category_ids))
    for classes in _blocks(counts):
        if len(classes) == len(counts):
            yield classes, slice(None), slice(None)
        else:
            annotations, rows = _within(truth, classes), _within(detections, classes)
            yield classes, np.flatnonzero(annotations), np.flatnonzero(rows)


def _blocks(counts: Ints) -> Iterator[range]:
    """Yield categories that have together as many detections as are matched at once."""
    first, total = 0, 0
    for k, count in enumerate(counts.tolist()):
        if total and total + count > _DETECTIONS_AT_ONCE:
            yield range(first, k)
            first, total = k, 0
        total += count
    yield range(first, len(counts))


def _within(boxes: Truth | Detections, classes: range) -> Bools:
    return np.asarray((boxes.category >= classes.start) & (boxes.category < classes.stop))


def _accumulate(
    truth: Truth,
    detections: Detections,
    classes: range,
    area_ranges: Floats,
    max_dets: int,
    precision: Floats,
    recall: Floats,
) -> None:
    """Set precision and recall of some categories, of which all boxes are."""
    matches = match(truth, detections, area_ranges=area_ranges, max_dets=max_dets)
    thresholds = np.arange(len(IOU_THRESHOLDS), dtype=np.uint64)
    first = _first_of_runs(matches.row)
    row = matches.row[first]  # detections that found anything, anywhere
    any_found, hits = (
        np.bitwise_or.reduceat(bits, first) if len(first) else bits
        for bits in (matches.where, matches.where & ~matches.ignored[matches.gt])
    )
    categories = np.arange(classes.start, classes.stop + 1)
    bounds = np.searchsorted(detections.category[matches.order], categories)
    ends = np.searchsorted(row, bounds)
    area = detections.box[matches.order, 2] * detections.box[matches.order, 3]
    for a, (low, high) in enumerate(area_ranges):
        bit = np.uint64(a * len(thresholds)) + thresholds
        counting = ((matches.ignored >> bit[0]) & np.uint64(1)) == 0
        positives = np.bincount(truth.category[counting], minlength=classes.stop)
        inside = (area >= low) & (area <= high)
        so_far = np.cumsum(inside)
        for i, k in enumerate(classes):
            if not positives[k]:
                continue
            part = slice(ends[i], ends[i + 1])
            here = row[part]
            found, hit = (((b[part, None] >> bit) & np.uint64(1)) > 0 for b in (any_found, hits))
            before = so_far[bounds[i] - 1] if bounds[i] else 0
            # false: of this size, and found nothing, not even what is ignored
            missing = np.cumsum(inside[here, None] & found, axis=0)
            false = (so_far[here] - before)[:, None] - missing
            precision[:, :, k, a] = precision_at_recalls(hit, false, int(positives[k]))
            for m, best in enumerate((1, 10, max_dets)):
                within = matches.rank[here] < best
                recall[:, k, a, m] = (hit & within[:, None]).sum(axis=0) / positives[k]
