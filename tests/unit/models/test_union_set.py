"""Box targets from all layers together, against given pairs, `transformers` and a loop."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import LossConfig
from models.build import build_criterion
from models.matcher import Matches, PaddedTargets, pad_targets
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput, Learning
from models.union_set import union_of_layers
from tests.unit.models.definitions import Target, giou, random_targets

CLASSES, QUERIES = 4, 9


def union(pairs: list[list[tuple[int, int]]], objects: int) -> tuple[dict[int, int], set[float]]:
    """Return the object of each query of one image, and what the pairs weigh."""
    query, target = torch.tensor(pairs).unbind(2)
    targets = PaddedTargets(
        torch.zeros(1, objects, dtype=torch.int64), torch.zeros(1, objects, 4), [objects]
    )
    united, weights = union_of_layers(
        Matches(torch.zeros(query.shape[1], dtype=torch.int64), query, target),
        targets,
        QUERIES,
        torch.float64,
    )
    assert united.real is not None
    assert all(torch.equal(row, united.query[0]) for row in united.query)
    real = united.real[0]
    found = zip(united.query[0, real].tolist(), united.target[0, real].tolist(), strict=True)
    return dict(found), set(weights[real].tolist())


def test_given_pairs() -> None:
    layers = [[(3, 0), (5, 1)], [(3, 0), (7, 1)], [(4, 0), (7, 1)], [(3, 1), (7, 1)]]
    assert union(layers, objects=2) == ({3: 0, 4: 0, 5: 1, 7: 1}, {0.5})


def test_of_equally_frequent_objects_the_first_is_learned() -> None:
    assert union([[(2, 1)], [(2, 0)]], objects=2)[0] == {2: 0}


@pytest.mark.long
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_it_is_that_of_transformers(seed: int, objects: int, layers: int) -> None:
    torch.manual_seed(seed)
    pairs = [
        list(zip(torch.randperm(QUERIES)[:objects].tolist(), range(objects), strict=True))
        for _ in range(layers)
    ]
    found, weights = union(pairs, objects)
    indices = [[tuple(torch.tensor(layer).unbind(1))] for layer in pairs]
    module = pytest.importorskip("transformers.loss.loss_deimv2")  # not in its oldest versions
    their_union: Any = module.Deimv2Loss._get_dense_o2o_indices
    rows, columns = their_union(None, indices[0], indices[1:])[0]
    theirs = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found.keys() == theirs.keys()
    assert weights == {objects / len(theirs)}
    flat = [pair for layer in pairs for pair in layer]
    for query, target in found.items():
        counts = {t: flat.count((query, t)) for t in range(objects)}
        assert counts[target] == max(counts.values())
        if list(counts.values()).count(counts[target]) == 1:  # theirs breaks ties at random
            assert theirs[query] == target


def losses_of(
    predictions: tuple[Tensor, Tensor], targets: list[Target], *, union_set: bool
) -> dict[str, Tensor]:
    config = LossConfig(union_set=union_set, cls_loss="vfl")
    output = DetectorOutput(groups=[GroupOutput("", *predictions, learning=ONE_TO_ONE)])
    return build_criterion(config)(output, targets)


@pytest.mark.parametrize("counts", [[3, 2], [0, 4], [0, 0], [12, 1]])
def test_boxes_learn_the_pairs_of_all_layers_and_scores_those_of_their_own(
    counts: list[int],
) -> None:
    torch.manual_seed(0)
    targets = random_targets(counts, CLASSES)
    logits = torch.randn(3, 2, QUERIES, CLASSES, dtype=torch.float64)
    boxes = torch.rand(3, 2, QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2
    plain, united = (
        losses_of((logits, boxes), targets, union_set=union_set) for union_set in (False, True)
    )
    assert plain.keys() == united.keys()
    matches = build_criterion(LossConfig()).matcher(
        [(logits, boxes, pad_targets(targets, torch.device("cpu")))]
    )[0]
    for layer, suffix in enumerate(("_0", "_1", "")):
        assert torch.equal(plain[f"loss_ce{suffix}"], united[f"loss_ce{suffix}"])
        l1 = overlap = 0.0
        for image, target in enumerate(targets):
            here = matches.image == image
            seen = [
                pair
                for query, index in zip(matches.query, matches.target, strict=True)
                for pair in zip(query[here].tolist(), index[here].tolist(), strict=True)
            ]
            chosen = {q: min(t for t in range(99) if (q, t) in most(seen, q)) for q, _ in seen}
            for q, t in chosen.items():
                weight = len(target["boxes"]) / len(chosen) / max(sum(counts), 1)
                box, wanted = boxes[layer, image, q], target["boxes"][t]
                l1 += weight * float((box - wanted).abs().sum())
                overlap += weight * float(1 - giou(box, wanted))
        assert float(united[f"loss_bbox{suffix}"]) == pytest.approx(l1, abs=1e-9)
        assert float(united[f"loss_giou{suffix}"]) == pytest.approx(overlap, abs=1e-9)


@pytest.mark.parametrize("counts", [[3, 2], [0, 4], [0, 0], [12, 1]])
def test_each_of_several_parts_learns_as_if_it_was_alone(counts: list[int]) -> None:
    torch.manual_seed(0)
    parts, targets = 3, random_targets(counts, CLASSES)
    logits = torch.randn(3, 2, parts * QUERIES, CLASSES, dtype=torch.float64)
    boxes = torch.rand(3, 2, parts * QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2
    learning = Learning(parts=parts, divisor=parts, weight=parts)
    criterion = build_criterion(LossConfig(union_set=True, cls_loss="vfl"))
    together = criterion(
        DetectorOutput(groups=[GroupOutput("_groups", logits, boxes, learning)]), targets
    )
    alone = [
        losses_of(predictions, targets, union_set=True)
        for predictions in zip(*(torch.split(t, QUERIES, 2) for t in (logits, boxes)), strict=True)
    ]
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        for layer in ("_0", "_1", ""):
            mean = torch.stack([losses[f"{name}{layer}"] for losses in alone]).mean()
            torch.testing.assert_close(together[f"{name}_groups{layer}"], mean)


def most(pairs: list[tuple[int, int]], query: int) -> set[tuple[int, int]]:
    """Return the most frequent of a query's pairs."""
    own = [pair for pair in pairs if pair[0] == query]
    return {pair for pair in own if own.count(pair) == max(map(own.count, own))}
