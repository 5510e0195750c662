"""Groups of queries: none sees another, and each learns from its own targets."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import LossConfig
from models.build import build_criterion
from models.decoder import DecoderOutput
from models.matcher import HungarianMatcher, Matches, PaddedTargets, pad_targets
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput, Learning, QueryGroup
from models.transformer import TransformerOutput
from tests.unit.models.definitions import (
    Coefficients,
    giou,
    layer_losses,
    match,
    random_targets,
)
from tests.unit.models.small import VARIANTS, random_images, small_model
from util.batch import pad_images

variants = pytest.mark.parametrize("variant", VARIANTS)
CLASSES = 5


def random_group(name: str, size: int, numbers: int, **options: Any) -> QueryGroup:
    """Return queries of two images."""
    content, position = torch.randn(2, 2, size, 64, dtype=torch.float64)
    reference = torch.rand(2, size, numbers, dtype=torch.float64) * 0.5 + 0.2
    return QueryGroup(name, content, position, reference, **{"learning": ONE_TO_ONE, **options})


def decode(variant: str) -> Callable[[list[QueryGroup]], DecoderOutput]:
    """Return what decodes groups of queries in the memory of two images."""
    model = small_model(**VARIANTS[variant])
    batch = pad_images(random_images((64, 64), (50, 60)))
    with torch.no_grad():
        features = model.feature_levels(batch)

    def run(groups: list[QueryGroup]) -> DecoderOutput:
        embed = None if model.query_embed is None else model.query_embed.weight
        with torch.no_grad():
            output: TransformerOutput = model.transformer(*features, embed, lambda *_: groups)
        return output.decoder

    return run


@variants
def test_no_group_sees_another(variant: str) -> None:
    run = decode(variant)
    numbers = 4 if variant == "two_stage" else 2
    one, other = random_group("_a", 5, numbers), random_group("_b", 3, numbers)
    alone, both = run([one]), run([one, other])
    changed = run([one, replace(other, content=other.content + 1, reference=other.reference / 2)])
    detecting = alone.boxes[-1].shape[1] - 5
    assert detecting == 7
    for a, b, c in zip(alone.boxes, both.boxes, changed.boxes, strict=True):
        assert b.shape[1] == c.shape[1] == detecting + 8
        torch.testing.assert_close(b[:, : detecting + 5], a, rtol=1e-12, atol=1e-12)
        assert torch.equal(b[:, : detecting + 5], c[:, : detecting + 5])
        assert not torch.isclose(b[:, detecting + 5 :], c[:, detecting + 5 :]).all(-1).any()
    none = run([])
    for a, b in zip(none.logits, both.logits, strict=True):
        torch.testing.assert_close(b[:, :detecting], a, rtol=1e-12, atol=1e-12)


def test_a_mask_applies_within_its_group() -> None:
    run = decode("plain")
    group = random_group("_a", 6, 2)
    blocked = torch.arange(6)[:, None] // 3 != torch.arange(6) // 3  # two halves
    masked = run([random_group("_b", 2, 2), replace(group, blocked=blocked)])
    halves = [
        replace(
            group, **{n: getattr(group, n)[:, half] for n in ("content", "position", "reference")}
        )
        for half in (slice(3), slice(3, None))
    ]
    apart = run(halves)
    for a, b in zip(masked.logits, apart.logits, strict=True):
        torch.testing.assert_close(a[:, -6:], b[:, -6:], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(run([group]).logits[-1][:, -6:], apart.logits[-1][:, -6:]).any()


@pytest.mark.long
@variants
def test_a_group_may_see_the_queries_that_detect(variant: str) -> None:
    run = decode(variant)
    numbers = 4 if variant == "two_stage" else 2
    group, other = (random_group(name, 6, numbers) for name in ("_a", "_b"))
    alone, beside = run([group]), run([other, replace(group, sees_detecting=True)])
    again = run([replace(group, sees_detecting=True)])
    for a, b, c in zip(alone.logits, beside.logits, again.logits, strict=True):
        torch.testing.assert_close(b[:, :7], a[:, :7], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b[:, -6:], c[:, -6:], rtol=1e-12, atol=1e-12)
        assert not torch.isclose(b[:, -6:], a[:, -6:]).all(-1).any()
    # each sees itself and those that detect alone: as if it were a group of one
    masked = run([replace(group, sees_detecting=True, blocked=~torch.eye(6, dtype=torch.bool))])
    ones = [
        replace(
            group,
            sees_detecting=True,
            **{n: getattr(group, n)[:, i : i + 1] for n in ("content", "position", "reference")},
        )
        for i in range(6)
    ]
    for a, b in zip(masked.logits, run(ones).logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_queries_beyond_the_size_learn_nothing() -> None:
    targets = random_targets([3, 2], CLASSES)
    detecting, (logits, boxes) = predictions(2, 6), predictions(2, 5)
    learning = Learning(size=4)
    padded = GroupOutput("_more", logits, boxes, learning)
    exact = GroupOutput("_more", logits[:, :, :4], boxes[:, :, :4], learning=ONE_TO_ONE)
    criterion = build_criterion(LossConfig())
    found, wanted = (
        criterion(outputs_of(GroupOutput("", *detecting, learning=ONE_TO_ONE), g), targets)
        for g in (padded, exact)
    )
    assert all(found[name].equal(value) for name, value in wanted.items())


def test_a_group_may_be_empty() -> None:
    run = decode("two_stage")
    empty, full = random_group("_a", 0, 4), random_group("_b", 2, 4)
    for a, b in zip(run([empty, full]).boxes, run([full]).boxes, strict=True):
        assert torch.equal(a, b)


def outputs_of(*groups: GroupOutput) -> DetectorOutput:
    first = groups[0]
    return DetectorOutput(
        pred_logits=first.logits[-1], pred_boxes=first.boxes[-1], groups=list(groups)
    )


def predictions(layers: int, queries: int) -> tuple[Tensor, Tensor]:
    """Return logits and boxes for two images."""
    logits = torch.randn(layers, 2, queries, CLASSES, dtype=torch.float64)
    return logits, torch.rand(layers, 2, queries, 4, dtype=torch.float64) * 0.5 + 0.2


def test_a_group_learns_from_targets_of_its_own_with_a_divisor_of_its_own() -> None:
    targets = random_targets([3, 2], CLASSES)

    def first_alone(padded: PaddedTargets) -> PaddedTargets:
        return replace(
            padded, labels=padded.labels[:, :1] * 0, boxes=padded.boxes[:, :1], counts=[1, 1]
        )

    detecting, more = predictions(2, 6), predictions(2, 4)
    outputs = outputs_of(
        GroupOutput("", *detecting, learning=ONE_TO_ONE),
        GroupOutput("_more", *more, Learning(targets=first_alone, divisor=2.5)),
    )
    losses = build_criterion(LossConfig())(outputs, targets)
    own = [{"labels": t["labels"][:1] * 0, "boxes": t["boxes"][:1]} for t in targets]
    coefficients, total = Coefficients(), []
    for layer, suffix in enumerate(("_0", "")):
        wanted = layer_losses(detecting[0][layer], detecting[1][layer], targets, coefficients)
        others = layer_losses(more[0][layer], more[1][layer], own, coefficients)
        for name, weight in zip(wanted, coefficients.loss, strict=True):
            torch.testing.assert_close(losses[f"{name}{suffix}"], wanted[name])
            value = others[name] * 2 / (5 * 2.5)  # over the batch's boxes, not the group's
            torch.testing.assert_close(losses[f"{name}_more{suffix}"], value)
            total += [weight * wanted[name], weight * value]
    torch.testing.assert_close(losses["loss"], torch.stack(total).sum())
    assert len(losses) == 2 + 2 * 6


def test_known_matches_are_not_searched_for() -> None:
    targets = random_targets([2, 1], CLASSES)
    logits, boxes = predictions(3, 4)
    (found,) = HungarianMatcher()([(logits, boxes, pad_targets(targets, torch.device("cpu")))])
    # the pairs of layer 0 for all layers
    known = Matches(found.image, found.query[:1], found.target[:1])
    outputs = outputs_of(
        GroupOutput("", logits, boxes, learning=ONE_TO_ONE),
        GroupOutput("_known", logits, boxes, Learning(matches=known)),
    )
    losses = build_criterion(LossConfig())(outputs, targets)
    queries, chosen = known.query[0], known.target[0]
    for layer, suffix in enumerate(("_0", "_1", "")):
        distance = torch.stack(
            [
                (boxes[layer, image, q] - targets[image]["boxes"][t]).abs().sum()
                for image, q, t in zip(known.image.tolist(), queries, chosen, strict=True)
            ]
        )
        torch.testing.assert_close(losses[f"loss_bbox_known{suffix}"], distance.sum() / 3)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{name}_known_0"], losses[f"{name}_0"])
    assert not torch.isclose(losses["loss_bbox_known"], losses["loss_bbox"])


def test_anchors_are_matched_in_place_of_boxes_and_classes_do_not_count() -> None:
    targets = random_targets([3, 2], CLASSES)
    (logits, boxes), anchors = predictions(1, 6), predictions(1, 6)[1][0]
    outputs = outputs_of(
        GroupOutput("", *predictions(2, 6), learning=ONE_TO_ONE),
        GroupOutput("_enc", logits, boxes, Learning(anchors=anchors)),
    )
    losses = build_criterion(LossConfig())(outputs, targets)
    costs = Coefficients(cost=(0.0, 5.0, 2.0))
    distance, overlap = logits.new_zeros(()), logits.new_zeros(())
    for image, target in enumerate(targets):
        for q, t in match(logits[0, image], anchors[image], target, costs):
            box, wanted = boxes[0, image, q], target["boxes"][t]
            distance += (box - wanted).abs().sum()
            overlap += 1 - giou(box, wanted)
    torch.testing.assert_close(losses["loss_bbox_enc"], distance / 5)
    torch.testing.assert_close(losses["loss_giou_enc"], overlap / 5)


def test_weights_of_losses_follow_the_registered_name() -> None:
    criterion = build_criterion(LossConfig(bbox_loss_coef=3))
    for name in ("loss_bbox", "loss_bbox_4", "loss_bbox_one2many_0", "loss_bbox_enc"):
        assert criterion.weight(name) == 3
    for name in ("loss", "class_error", "loss_bboxes", "grad_norm"):
        assert criterion.weight(name) is None
