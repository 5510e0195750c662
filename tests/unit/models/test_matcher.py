"""The matcher against brute force and the written-out cost."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.matcher import HungarianMatcher, Matches, pad_targets
from tests.unit.models.definitions import Coefficients, Target, match, random_targets

CLASSES = 4
CPU = torch.device("cpu")
counts_and_queries = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 5)
)


def random_predictions(layers: int, n: int, q: int) -> tuple[Tensor, Tensor]:
    """Return float64 logits [G,N,Q,classes] and boxes [G,N,Q,4]."""
    logits = torch.randn(layers, n, q, CLASSES, dtype=torch.float64) * 2
    return logits, torch.rand(layers, n, q, 4, dtype=torch.float64) * 0.5 + 0.2


def pairs_of(matches: Matches, layer: int, image: int) -> set[tuple[int, int]]:
    """Return the (query, target) pairs of one image in one layer."""
    kept = matches.image == image
    return set(
        zip(matches.query[layer, kept].tolist(), matches.target[layer, kept].tolist(), strict=True)
    )


@given(counts_and_queries, st.integers(0, 2**32))
def test_total_cost_is_the_minimum_of_all_assignments(
    sizes: tuple[list[int], int], seed: int
) -> None:
    torch.manual_seed(seed)
    counts, q = sizes
    targets = random_targets(counts, CLASSES)
    matcher = HungarianMatcher()
    padded = pad_targets(targets, CPU)
    logits, boxes = random_predictions(2, len(counts), q)
    cost = matcher.cost(logits, boxes, padded)
    (matches,) = matcher([(logits, boxes, padded)])
    for layer, (image, count) in itertools.product(range(2), enumerate(counts)):
        pairs = pairs_of(matches, layer, image)
        size = min(count, q)
        queries, chosen = {a for a, _ in pairs}, {b for _, b in pairs}
        assert len(pairs) == len(queries) == len(chosen) == size
        block = cost[layer, image, :, :count]
        minimum = min(
            sum(float(block[i, j]) for i, j in zip(rows, columns, strict=True))
            for rows in itertools.permutations(range(q), size)
            for columns in itertools.combinations(range(count), size)
        )
        assert sum(float(block[i, j]) for i, j in pairs) == pytest.approx(minimum, abs=1e-9)


@pytest.mark.parametrize(
    "coefficients",
    [Coefficients(), Coefficients(cost=(1, 0, 0)), Coefficients(cost=(0.5, 1, 3), alpha=0.6)],
)
def test_pairs_equal_the_definition(coefficients: Coefficients) -> None:
    targets = random_targets([3, 0, 7, 1], CLASSES)
    logits, boxes = random_predictions(3, 4, 5)
    cost_class, cost_bbox, cost_giou = coefficients.cost
    matcher = HungarianMatcher(
        cost_class=cost_class,
        cost_bbox=cost_bbox,
        cost_giou=cost_giou,
        focal_alpha=coefficients.alpha,
    )
    (matches,) = matcher([(logits, boxes, pad_targets(targets, CPU))])
    for layer, image in itertools.product(range(3), range(4)):
        expected = match(logits[layer, image], boxes[layer, image], targets[image], coefficients)
        assert pairs_of(matches, layer, image) == set(expected)


def test_groups_of_unequal_query_counts_are_matched_apart() -> None:
    targets = pad_targets(random_targets([2, 3], CLASSES), CPU)
    groups = [(*random_predictions(2, 2, 4), targets), (*random_predictions(1, 2, 9), targets)]
    matcher = HungarianMatcher()
    together = matcher(groups)
    for alone, found in zip((matcher([g])[0] for g in groups), together, strict=True):
        assert torch.equal(alone.query, found.query)
        assert torch.equal(alone.target, found.target)
        assert torch.equal(alone.image, found.image)


def test_no_target_anywhere_gives_no_pair() -> None:
    (matches,) = HungarianMatcher()(
        [(*random_predictions(2, 3, 4), pad_targets(random_targets([0, 0, 0], CLASSES), CPU))]
    )
    assert matches.image.shape == (0,)
    assert matches.query.shape == matches.target.shape == (2, 0)


def test_padding_keeps_labels_boxes_and_counts() -> None:
    targets: list[Target] = random_targets([2, 0, 3], CLASSES)
    padded = pad_targets(targets, CPU)
    assert padded.counts == [2, 0, 3]
    assert padded.labels.shape == (3, 3)
    assert padded.labels.max() < CLASSES
    for i, target in enumerate(targets):
        assert torch.equal(padded.labels[i, : len(target["labels"])], target["labels"])
        assert torch.equal(padded.boxes[i, : len(target["boxes"])], target["boxes"])


def test_half_precision_predictions_are_matched_in_float32() -> None:
    logits, boxes = random_predictions(1, 1, 6)
    targets = pad_targets(random_targets([3], CLASSES), CPU)
    half = (logits.bfloat16(), boxes.bfloat16())
    cost = HungarianMatcher().cost(*half, targets)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(
        cost, HungarianMatcher().cost(half[0].float(), half[1].float(), targets)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_matched_last(bad: float) -> None:
    logits, boxes = random_predictions(2, 1, 5)
    targets = pad_targets(random_targets([2], CLASSES), CPU)
    (alone,) = HungarianMatcher()([(logits[:, :, :3], boxes[:, :, :3], targets)])
    boxes[0, 0, 3:, 0], logits[1, 0, 3:] = bad, float("nan")
    (matches,) = HungarianMatcher()([(logits, boxes, targets)])
    for layer in range(2):
        assert pairs_of(matches, layer, 0) == pairs_of(alone, layer, 0)
    boxes[:] = bad
    (matches,) = HungarianMatcher()([(logits, boxes, targets)])
    assert matches.query.shape == (2, 2)


def test_a_matcher_without_any_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="all matching costs are 0"):
        HungarianMatcher(cost_class=0, cost_bbox=0, cost_giou=0)
