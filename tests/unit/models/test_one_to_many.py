"""The quality assignment against a plain loop over its definition, and against given examples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.matcher import Matches, PaddedTargets, pad_targets
from models.one_to_many import assign_by_quality
from tests.unit.models.definitions import random_targets

MOST, THRESHOLD = 6, 0.4
CLASSES = 3


def iou(a: list[float], b: list[float]) -> float:
    """Return the IoU of two cxcywh boxes."""
    sides = []
    for axis in (0, 1):
        low = max(a[axis] - a[axis + 2] / 2, b[axis] - b[axis + 2] / 2)
        high = min(a[axis] + a[axis + 2] / 2, b[axis] + b[axis + 2] / 2)
        sides.append(max(high - low, 0.0))
    shared = sides[0] * sides[1]
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def quality_of(logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> list[list[float]]:
    """Return the quality of every query for every object of one image, by object."""
    scores = logits.sigmoid().tolist()
    return [
        [
            0.7 * iou(box, target) + 0.3 * score[int(label)]
            for box, score in zip(boxes.tolist(), scores, strict=True)
        ]
        for label, target in zip(labels, wanted.tolist(), strict=True)
    ]


def by_loop(quality: list[list[float]]) -> tuple[set[tuple[int, int]], dict[int, int]]:
    """Return the pairs (query, object) of one image, and which object's class a query learns."""
    objects, queries = range(len(quality)), range(len(quality[0]) if quality else 0)
    own = {q: max(objects, key=lambda g: quality[g][q]) for q in queries}
    positive = {q for q in queries if quality[own[q]][q] >= THRESHOLD}
    positive |= {max(queries, key=lambda q: quality[g][q]) for g in objects}
    pairs = set()
    for g in objects:
        votes = sum(own[q] == g for q in positive)
        ranked = sorted(queries, key=lambda q: -quality[g][q])
        pairs |= {(q, g) for q in ranked[: min(votes, MOST)]}
    learned = {
        q: max((g for other, g in pairs if other == q), key=lambda g: quality[g][q])
        for q, _ in pairs
    }
    return pairs, learned


def pairs_of(
    matches: Matches, layer: int, image: int
) -> tuple[set[tuple[int, int]], dict[int, int]]:
    """Return what was assigned in one layer of one image, as `by_loop` does."""
    pairs, learned = set[tuple[int, int]](), dict[int, int]()
    if matches.real is None or matches.chosen is None:
        assert matches.query.numel() == 0
        return pairs, learned
    for n, q, t, real, chosen in zip(
        matches.image.tolist(), matches.query[layer].tolist(), matches.target[layer].tolist(),
        matches.real[layer].tolist(), matches.chosen[layer].tolist(), strict=True,
    ):  # fmt: skip
        if n == image and real:
            assert (q, t) not in pairs
            pairs.add((q, t))
        if n == image and chosen:
            assert real
            assert q not in learned
            learned[q] = t
    return pairs, learned


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    queries=st.integers(1, 25),
    layers=st.integers(1, 2),
    near=st.booleans(),
)
def test_it_is_a_loop_over_its_definition(
    seed: int, counts: list[int], queries: int, layers: int, near: bool
) -> None:
    torch.manual_seed(seed)
    targets = random_targets(counts, CLASSES)
    shape = (layers, len(counts), queries)
    logits = torch.randn(*shape, CLASSES, dtype=torch.float64) * 2
    boxes = torch.rand(*shape, 4, dtype=torch.float64) * 0.4 + 0.2
    if near:  # queries around objects: many of them reach the threshold
        for image, target in enumerate(targets):
            if len(target["boxes"]):
                chosen = torch.randint(len(target["boxes"]), (layers, queries))
                noise = torch.rand(layers, queries, 4, dtype=torch.float64) * 0.04
                boxes[:, image] = target["boxes"][chosen] + noise
    matches = assign_by_quality(logits, boxes, pad_targets(targets, torch.device("cpu")))
    for layer in range(layers):
        for image, target in enumerate(targets):
            quality = quality_of(
                logits[layer, image], boxes[layer, image], target["labels"], target["boxes"]
            )
            expected = by_loop(quality) if quality else (set(), {})
            assert pairs_of(matches, layer, image) == expected


def assigned_of(quality: list[list[float]]) -> tuple[set[tuple[int, int]], dict[int, int]]:
    """Return what is assigned where queries have these qualities, by object."""
    # without overlap, a query's quality is 0.3 of its score: each object is a class of its own
    table = torch.tensor(quality, dtype=torch.float64).T  # [Q,objects]
    objects = table.shape[1]
    far = torch.tensor([0.9, 0.9, 0.01, 0.01], dtype=torch.float64)
    near = torch.tensor([0.1, 0.1, 0.01, 0.01], dtype=torch.float64)
    targets = PaddedTargets(torch.arange(objects)[None], near.expand(1, objects, 4), [objects])
    matches = assign_by_quality(
        table.logit()[None, None],
        far.expand(1, 1, len(table), 4),
        targets,
        iou_weight=0.0,
    )
    return pairs_of(matches, 0, 0)


@pytest.mark.parametrize(
    ("quality", "pairs", "learned"),
    [
        (  # query 1 serves both and learns the class of the second; query 2 becomes background
            [[0.90, 0.50, 0.45, 0.10, 0.05], [0.20, 0.60, 0.30, 0.35, 0.02]],
            {(1, 0), (1, 1), (0, 0)},
            {0: 0, 1: 1},
        ),
        # the first object's best query is that of the second, too: it gets nothing
        ([[0.30, 0.10, 0.20], [0.35, 0.05, 0.02]], {(0, 1)}, {0: 1}),
    ],
)
def test_given_qualities(
    quality: list[list[float]], pairs: set[tuple[int, int]], learned: dict[int, int]
) -> None:
    assert assigned_of(quality) == (pairs, learned)
    assert by_loop(quality) == (pairs, learned)


def test_an_object_has_six_queries_at_most() -> None:
    pairs, _ = assigned_of([[0.5 + 0.01 * q for q in range(9)]])
    assert pairs == {(q, 0) for q in range(3, 9)}
