"""Kinds of errors and their cost against TIDE's definition, written out in plain loops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from engine.evaluation import matching, outcomes
from engine.evaluation.analysis import analyse
from engine.evaluation.matching import Detections
from tests.unit.engine.evaluation.shared import evaluator_with
from tests.unit.engine.evaluation.test_matching import random_detections, random_ground_truth

Annotation = dict[str, Any]
Entry = tuple[int, float, bool]  # category, score, right
LEVELS = np.linspace(0, 1, 101).tolist()  # of recall; COCO's, whose 0.7 is a little more than 7/10


@dataclass
class Shot:
    """A detection, what it found, and if it is wrong, why and on which object."""

    image: int
    category: int
    box: list[float]
    score: float
    found: int | None = None  # id of the annotation
    kind: str = ""
    about: Annotation | None = None


def shared_area(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def overlap(a: list[float], b: list[float]) -> float:
    both = shared_area(a, b)
    return both / (a[2] * a[3] + b[2] * b[3] - both) if both else 0.0


def on_crowd(shot: Shot, coco: COCO) -> bool:
    return any(
        shared_area(shot.box, a["bbox"]) >= 0.5 * shot.box[2] * shot.box[3]
        for a in coco.imgToAnns[shot.image]
        if a["iscrowd"] and a["category_id"] == shot.category
    )


def explain(shot: Shot, objects: list[Annotation], taken: set[int]) -> None:
    """Return why a detection that found nothing is wrong, in the order of TIDE's definition."""

    def most(keep: Callable[[Annotation], bool]) -> tuple[float, Annotation | None]:
        rows = [(overlap(shot.box, a["bbox"]), a) for a in objects if keep(a)]
        return max(rows, key=lambda row: row[0], default=(0.0, None))

    own, its = most(lambda a: a["category_id"] == shot.category)
    other, anothers = most(lambda a: a["category_id"] != shot.category)
    used, _ = most(lambda a: a["category_id"] == shot.category and a["id"] in taken)
    if 0.1 <= own <= 0.5:
        shot.kind, shot.about = "location", its
    elif other >= 0.5:
        shot.kind, shot.about = "class", anothers
    elif used >= 0.5:
        shot.kind = "duplicate"
    else:
        shot.kind = "background" if max(own, other) <= 0.1 else "both"


def shots_of(coco: COCO, found: Detections) -> tuple[list[Shot], set[int]]:
    """Return the detections that are not on crowds, and the ids of what they found."""
    images, categories = sorted(coco.imgs), sorted(coco.cats)
    columns = (found.image, found.category, found.box, found.score)
    shots = [
        Shot(images[i], categories[c], box, score)
        for i, c, box, score in zip(*(c.tolist() for c in columns), strict=True)
    ]
    shots.sort(key=lambda shot: -shot.score)
    objects = {i: [a for a in coco.imgToAnns[i] if not a["iscrowd"]] for i in coco.imgs}
    taken: set[int] = set()
    for shot in shots:
        free = [
            (overlap(shot.box, a["bbox"]), a["id"])
            for a in objects[shot.image]
            if a["category_id"] == shot.category and a["id"] not in taken
        ]
        best, which = max(free, default=(0.0, 0))
        if best >= 0.5:
            shot.found = which
            taken.add(which)
    shots = [shot for shot in shots if shot.found is not None or not on_crowd(shot, coco)]
    for shot in shots:
        if shot.found is None:
            explain(shot, objects[shot.image], taken)
    return shots, taken


def ap(entries: list[tuple[float, bool]], objects: int) -> float:
    """Return the mean over 101 recalls of the best precision there or beyond."""
    points, right = [], 0
    for place, (_, hit) in enumerate(sorted(entries, key=lambda entry: -entry[0]), 1):
        right += hit
        points.append((right / objects, right / place))
    return sum(max((p for r, p in points if r >= level), default=0.0) for level in LEVELS) / 101


def mean_ap(entries: list[Entry], objects: dict[int, int]) -> float:
    values = []
    for category, count in objects.items():
        own = [(score, hit) for c, score, hit in entries if c == category]
        if count or own:
            values.append(ap(own, count) if count else 0.0)
    return sum(values) / len(values) if values else 1.0  # nothing is left to be wrong


def fix(shots: list[Shot], taken: set[int], kind: str) -> list[Entry]:
    """Return the detections with one kind of error set right, or taken out where that cannot be."""
    given_to: dict[int, Shot] = {}  # an object is found by the best of the errors about it
    for shot in sorted(shots, key=lambda shot: -shot.score):
        if shot.about is not None and shot.about["id"] not in taken:
            given_to.setdefault(shot.about["id"], shot)
    entries = []
    for shot in shots:
        if shot.kind != kind:
            entries.append((shot.category, shot.score, shot.found is not None))
        elif shot.about is not None and given_to.get(shot.about["id"]) is shot:
            entries.append((shot.about["category_id"], shot.score, True))
    return entries


def by_definition(coco: COCO, found: Detections) -> dict[str, tuple[int, float]]:
    """Return how often each kind occurs and by how much AP50 rises without it (with objects)."""
    shots, taken = shots_of(coco, found)
    truth = [a for a in coco.dataset["annotations"] if not a["iscrowd"]]
    objects = {c: sum(a["category_id"] == c for a in truth) for c in coco.cats}
    base = mean_ap(fix(shots, taken, "none"), objects)
    rows = {}
    for kind in ("class", "location", "both", "duplicate", "background"):
        rise = mean_ap(fix(shots, taken, kind), objects) - base
        rows[kind] = (sum(shot.kind == kind for shot in shots), max(rise, 0.0))
    known = taken | {shot.about["id"] for shot in shots if shot.about is not None}
    missed = [a["category_id"] for a in truth if a["id"] not in known]
    fewer = {c: count - missed.count(c) for c, count in objects.items()}
    rise = mean_ap(fix(shots, taken, "none"), fewer) - base
    rows["missed"] = (len(missed), max(rise, 0.0))
    return rows


@pytest.mark.parametrize("seed", range(60))
def test_kinds_and_costs_are_those_of_the_definition(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:  # in parts, as many detections are
        monkeypatch.setattr(matching, "_DETECTIONS_AT_ONCE", 1 + seed % 5)
        monkeypatch.setattr(matching, "_COMPARED_AT_ONCE", 1 + seed % 7)
        monkeypatch.setattr(outcomes, "_CLASSIFIED_AT_ONCE", 1 + seed % 9)
    draw = np.random.default_rng(seed)
    coco = random_ground_truth(draw, most_boxes=14)
    found = random_detections(draw, coco, 8)
    found.score[:] = draw.permutation(len(found.score)) / max(1, len(found.score))  # no ties
    found.box[:] += draw.uniform(0, 0.01, found.box.shape)
    evaluator = evaluator_with(coco, found)
    ours = analyse(evaluator, evaluator.evaluate()).errors
    objects = any(not a["iscrowd"] for a in coco.dataset["annotations"])
    for kind, (count, cost) in by_definition(coco, found).items():
        assert ours[kind].count == count, kind
        expected = pytest.approx(cost, abs=1e-12) if objects else None
        assert ours[kind].delta_AP50 == expected, kind
