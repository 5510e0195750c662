"""The whole detector: shapes, heads, gradients, and what an image's neighbours may change."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import LossConfig
from models.build import build_criterion, build_model
from models.queries import DetectorOutput
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, group_of, random_images, small_config, small_model
from util.batch import pad_images

SIZES = [(60, 90), (75, 64)]
variants = pytest.mark.parametrize("variant", VARIANTS)


def assert_same(a: DetectorOutput, b: DetectorOutput, image: int = 0) -> None:
    """Compare the predictions for one image of `a` with those of the only one of `b`."""
    left, right = group_of(a), group_of(b)
    for x, y in ((left.logits, right.logits), (left.boxes, right.boxes)):
        torch.testing.assert_close(x[:, image], y[:, 0], rtol=1e-8, atol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("levels", [1, 3, 4, 5])
@variants
def test_output_shapes(variant: str, levels: int) -> None:
    model = small_model(num_feature_levels=levels, **VARIANTS[variant])
    with torch.no_grad():
        output = model(pad_images(random_images(*SIZES)))
    detecting = group_of(output)
    assert detecting.logits.shape[:2] == detecting.boxes.shape[:2] == (3, 2)
    assert detecting.logits.shape[3] == 5
    assert detecting.boxes.shape[2:] == (detecting.logits.shape[2], 4)
    assert torch.equal(output["pred_logits"], detecting.logits[-1])
    assert torch.equal(output["pred_boxes"], detecting.boxes[-1])
    assert detecting.boxes.ge(0).all()
    assert detecting.boxes.le(1).all()
    assert [g.name for g in output["groups"]] == ["", "_enc"][: 1 + (variant == "two_stage")]
    if variant == "two_stage":
        encoder = group_of(output, "_enc")
        tokens = encoder.logits.shape[2]
        assert encoder.logits.shape == (1, 2, tokens, 5)
        assert encoder.boxes.shape == (1, 2, tokens, 4)
        assert detecting.logits.shape[2] == min(7, tokens)
    else:
        assert detecting.logits.shape[2] == 7


@variants
def test_without_auxiliary_losses_only_the_last_layer_is_supervised(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    batch = pad_images(random_images(*SIZES))
    with torch.no_grad():
        full = model(batch)
        model.aux_loss = False
        last = model(batch)
    assert torch.equal(group_of(last).logits, group_of(full).logits[-1:])
    losses = build_criterion(LossConfig())(last, random_targets([1, 2], 5))
    assert not [name for name in losses if name[-1].isdigit()]
    assert ("loss_ce_enc" in losses) == (variant == "two_stage")


@pytest.mark.long
@variants
def test_every_trainable_parameter_gets_a_gradient(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).train()
    output = model(pad_images(random_images(*SIZES)))
    losses = build_criterion(LossConfig())(output, random_targets([3, 2], 5))
    torch.autograd.backward(losses["loss"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@variants
def test_no_target_still_trains_without_unused_parameters(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).train()
    output = model(pad_images(random_images(*SIZES)))
    losses = build_criterion(LossConfig())(output, random_targets([0, 0], 5))
    torch.autograd.backward(losses["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@variants
def test_a_neighbour_that_adds_no_padding_changes_nothing(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    first, second = random_images((64, 96), (40, 70))
    with torch.no_grad():
        alone = model(pad_images([first]))
        assert_same(model(pad_images([first, second])), alone)
        assert_same(model(pad_images([second, first])), alone, image=1)


def test_padding_changes_a_prediction_through_the_group_norm_as_in_the_official_model() -> None:
    """Group norm averages over padding too, so batches of other sizes give other numbers."""
    model = small_model()
    small, large = random_images((64, 64), (96, 128))
    with torch.no_grad():
        alone = model(pad_images([small]))
        padded = model(pad_images([small, large]))
    difference = (alone["pred_logits"][0] - padded["pred_logits"][0]).abs().max()
    assert difference > 1e-6


def test_dropout_acts_in_training_alone() -> None:
    model = small_model(dropout=0.5)
    batch = pad_images(random_images((64, 64)))
    with torch.no_grad():
        assert torch.equal(model(batch)["pred_logits"], model(batch)["pred_logits"])
        model.train()
        assert not torch.equal(model(batch)["pred_logits"], model(batch)["pred_logits"])


def head_counts(**options: Any) -> tuple[int, int, int]:
    """Return the number of heads listed, and of different class and box heads."""
    model = build_model(small_config(**options), num_classes=5)
    assert len(model.class_embed) == len(model.bbox_embed)
    return (
        len(model.class_embed),
        len({id(m) for m in model.class_embed}),
        len({id(m) for m in model.bbox_embed}),
    )


def test_heads_are_shared_without_refinement_and_own_with_it() -> None:
    assert head_counts() == (3, 1, 1)
    assert head_counts(**VARIANTS["refine"]) == (3, 3, 3)
    assert head_counts(**VARIANTS["two_stage"]) == (4, 4, 4)


def size_biases(variant: str) -> list[float]:
    """Return the width bias every fresh box head starts with."""
    model = build_model(small_config(**VARIANTS[variant]), num_classes=5)
    return [float(head.layers[-1].bias[2].detach()) for head in model.bbox_embed]  # type: ignore[union-attr, index]


def test_sizes_start_small_where_proposals_do_not_set_them() -> None:
    assert size_biases("plain") == [-2, -2, -2]
    assert size_biases("refine") == [-2, 0, 0]
    assert size_biases("two_stage") == [0, 0, 0, 0]


def test_classes_start_at_a_hundredth() -> None:
    model = build_model(small_config(), num_classes=5)
    bias: Tensor = model.class_embed[0].bias  # type: ignore[assignment]
    torch.testing.assert_close(bias.sigmoid(), torch.full((5,), 0.01))


def test_extra_levels_come_from_the_raw_last_map_then_from_each_other() -> None:
    model = small_model(num_feature_levels=5)
    batch = pad_images(random_images((64, 96)))
    with torch.no_grad():
        features, masks, pos = model.feature_levels(batch)
        maps, _, _ = model.backbone(batch)
        torch.testing.assert_close(features[3], model.input_proj[3](maps[-1]))
        torch.testing.assert_close(features[4], model.input_proj[4](features[3]))
    shapes = [tuple(f.shape[2:]) for f in features]
    assert shapes == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert [tuple(m.shape[1:]) for m in masks] == shapes
    assert [tuple(p.shape[2:]) for p in pos] == shapes


def test_single_level_uses_the_last_map() -> None:
    model = small_model(num_feature_levels=1)
    with torch.no_grad():
        features, _, _ = model.feature_levels(pad_images(random_images((64, 96))))
    assert [tuple(f.shape) for f in features] == [(1, 64, 2, 3)]


def test_resnet_and_learned_encoding_detect_too() -> None:
    model = small_model(backbone="resnet18", position_embedding="learned")
    with torch.no_grad():
        output = model(pad_images(random_images(*SIZES)))
    assert output["pred_boxes"].isfinite().all()
