"""The criterion against losses written out from the papers, and its symmetries."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import LossConfig
from models.build import build_criterion
from models.proposals import objects_of_one_class
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput, Learning
from tests.unit.models.definitions import Coefficients, Target, random_targets, total_loss

CLASSES = 3
COUNTS = {
    "unequal": [3, 1, 2],
    "one image without": [2, 0, 1],
    "none at all": [0, 0, 0],
    "more than queries": [6, 1, 5],
}
OTHER = LossConfig(
    set_cost_class=1, set_cost_bbox=3, set_cost_giou=0.5,
    cls_loss_coef=1.5, bbox_loss_coef=0.25, giou_loss_coef=4, focal_alpha=0.4,
)  # fmt: skip


def coefficients_of(config: LossConfig) -> Coefficients:
    """Return the same coefficients for the written-out loss."""
    return Coefficients(
        cost=(config.set_cost_class, config.set_cost_bbox, config.set_cost_giou),
        loss=(config.cls_loss_coef or 2.0, config.bbox_loss_coef, config.giou_loss_coef),
        alpha=config.focal_alpha,
    )


def random_outputs(
    n: int, *, layers: int = 2, queries: int = 4, tokens: int = 0, classes: int = CLASSES
) -> DetectorOutput:
    """Return predictions that are leaves of autograd; `tokens` adds those of an encoder."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    logits = leaf(layers, n, queries, classes).requires_grad_()
    boxes = (leaf(layers, n, queries, 4) * 0.7).sigmoid().detach().requires_grad_()
    groups = [GroupOutput("", logits, boxes, learning=ONE_TO_ONE)]
    if tokens:
        logits = leaf(1, n, tokens, classes).requires_grad_()
        boxes = leaf(1, n, tokens, 4).sigmoid().detach().requires_grad_()
        learning = Learning(targets=objects_of_one_class)
        groups.append(GroupOutput("_enc", logits, boxes, learning))
    return outputs_of(groups)


def outputs_of(groups: list[GroupOutput]) -> DetectorOutput:
    """Return what a detector with these groups predicts."""
    first = groups[0]
    return DetectorOutput(pred_logits=first.logits[-1], pred_boxes=first.boxes[-1], groups=groups)


def part_of(outputs: DetectorOutput, images: slice | list[int]) -> DetectorOutput:
    """Return the predictions for some of the images."""
    return outputs_of(
        [
            replace(g, logits=g.logits[:, images], boxes=g.boxes[:, images])
            for g in outputs["groups"]
        ]
    )


def leaves_of(outputs: DetectorOutput) -> list[Tensor]:
    """Return the predictions that losses are computed from."""
    return [leaf for group in outputs["groups"] for leaf in (group.logits, group.boxes)]


@pytest.mark.parametrize("config", [LossConfig(), OTHER], ids=["default", "other"])
@pytest.mark.parametrize("tokens", [0, 7], ids=["one stage", "two stage"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_losses_and_gradients_follow_the_papers(
    counts: list[int], tokens: int, config: LossConfig
) -> None:
    outputs = random_outputs(3, tokens=tokens)
    targets = random_targets(counts, CLASSES)
    detecting, *proposals = outputs["groups"]
    encoder = (proposals[0].logits[0], proposals[0].boxes[0]) if tokens else None
    total, named = total_loss(
        detecting.logits, detecting.boxes, targets, coefficients_of(config), encoder
    )
    losses = build_criterion(config)(outputs, targets)
    assert set(losses) == {"loss", "class_error", *named}
    for name, value in named.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(losses["loss"], total, rtol=1e-9, atol=1e-12)
    leaves = leaves_of(outputs)
    ours = torch.autograd.grad(losses["loss"], leaves, retain_graph=True)
    theirs = torch.autograd.grad(total, leaves, allow_unused=True)
    for a, b, leaf in zip(ours, theirs, leaves, strict=True):
        b = torch.zeros_like(leaf) if b is None else b  # boxes no target was matched with
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@settings(max_examples=20)
@given(st.permutations(range(3)), st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_order_of_targets_and_of_images_does_not_matter(
    order: list[int], counts: list[int]
) -> None:
    outputs, targets = random_outputs(3, tokens=6), random_targets(counts, CLASSES)
    shuffled: list[Target] = []
    for index in order:
        permutation = torch.randperm(counts[index])
        shuffled.append({key: value[permutation] for key, value in targets[index].items()})
    moved = part_of(outputs, list(order))
    criterion = build_criterion(LossConfig())
    expected, found = criterion(outputs, targets), criterion(moved, shuffled)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_class_error_is_the_share_of_matched_queries_with_a_wrong_best_class() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 6.0], [9.0, 0.0, 0.0]])
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1],
                          [0.2, 0.8, 0.1, 0.1]])  # fmt: skip
    outputs = outputs_of(
        [GroupOutput("", logits[None, None], boxes[None, None], learning=ONE_TO_ONE)]
    )
    targets = [{"labels": torch.tensor([2, 1, 0, 0]), "boxes": boxes[[2, 1, 0, 3]]}]
    criterion = build_criterion(LossConfig(set_cost_class=0))
    assert criterion(outputs, targets)["class_error"] == 0
    targets[0]["labels"] = torch.tensor([2, 1, 0, 1])
    assert criterion(outputs, targets)["class_error"] == 25
    assert not criterion(outputs, targets)["class_error"].requires_grad


def test_half_precision_losses_are_summed_in_float32() -> None:
    outputs = random_outputs(2, queries=50, classes=91)
    targets = random_targets([3, 2], 91)
    (group,) = outputs["groups"]
    half = outputs_of(
        [GroupOutput("", group.logits.bfloat16(), group.boxes.bfloat16(), learning=ONE_TO_ONE)]
    )
    losses = build_criterion(LossConfig())(half, targets)
    assert losses["loss"].dtype == torch.float32
    expected = build_criterion(LossConfig())(outputs, targets)["loss"]
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=2e-2, atol=0)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=5), st.data())
def test_parts_of_a_batch_that_share_its_count_add_up_to_it(
    counts: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(counts) - 1))
    outputs, targets = random_outputs(len(counts), tokens=5), random_targets(counts, CLASSES)
    criterion = build_criterion(LossConfig())
    whole = criterion(outputs, targets)
    expected = torch.autograd.grad(whole["loss"], leaves_of(outputs))
    parts = []
    for part in (slice(None, cut), slice(cut, None)):
        parts.append(criterion(part_of(outputs, part), targets[part], max(sum(counts), 1)))
    for name in whole:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], msg=name)
    found = torch.autograd.grad(parts[0]["loss"] + parts[1]["loss"], leaves_of(outputs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("counts", [[2, 1], [0, 0]])
def test_non_finite_predictions_make_the_loss_non_finite(counts: list[int]) -> None:
    targets = random_targets(counts, CLASSES)
    for bad in (float("nan"), float("inf")):
        outputs = random_outputs(2)
        outputs["groups"][0].logits.data[0, 1, 2, 0] = bad
        losses = build_criterion(LossConfig())(outputs, targets)
        assert not losses["loss"].isfinite()
        assert losses["loss_ce"].isfinite()  # of the last layer
    outputs = random_outputs(2)
    outputs["groups"][0].boxes.data[-1] = float("nan")
    losses = build_criterion(LossConfig())(outputs, targets)
    assert bool(losses["loss"].isnan()) == any(counts)
