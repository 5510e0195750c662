"""Mixed query selection and look-forward-twice: what learns from what."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.queries import QueryGroup
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import perturb, random_images, small_config
from util.batch import pad_images
from util.errors import ConfigError


def two_stage(**options: Any) -> DeformableDETR:
    """Return a perturbed two-stage model in training mode."""
    torch.manual_seed(0)
    config = small_config(dropout=0.0, with_box_refine=True, two_stage=True, **options)
    model = build_model(config, num_classes=5).double().train()
    perturb(model)
    return model


def layers(model: DeformableDETR) -> Tensor:
    """Return the boxes of every decoder layer."""
    torch.manual_seed(1)
    outputs = model(pad_images(random_images((96, 128))), random_targets([2], 5))
    boxes: Tensor = outputs["groups"][0].boxes
    return boxes


def reached(model: DeformableDETR, layer: int) -> list[bool]:
    """Return which box heads of the decoder have a gradient from a loss of this layer's boxes."""
    model.zero_grad()
    torch.autograd.backward(layers(model)[layer].sum())
    return [
        any(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
        for head in model.bbox_embed[:3]
    ]


def test_a_layer_teaches_the_layer_before_and_none_before_that() -> None:
    plain, twice = two_stage(), two_stage(look_forward_twice=True)
    assert torch.equal(layers(plain), layers(twice))
    assert reached(plain, 1) == [False, True, False]
    assert reached(twice, 1) == [True, True, False]
    assert reached(twice, 2) == [False, True, True]


def test_without_losses_of_earlier_layers_the_head_that_is_taught_learns() -> None:
    assert reached(two_stage(aux_loss=False), 0) == [False, False, True]
    assert reached(two_stage(aux_loss=False, look_forward_twice=True), 0) == [False, True, True]


def test_contents_are_learned_and_the_same_for_all_images() -> None:
    model = two_stage(mixed_query_selection=True)
    assert model.query_embed is not None
    assert model.query_embed.weight.shape == (7, 64)
    seen: list[QueryGroup] = []
    decoder = model.transformer.decoder
    decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    torch.manual_seed(1)
    model(pad_images(random_images((96, 128), (128, 96))))
    (group,) = seen
    assert torch.equal(group.content[0], group.content[1])
    assert torch.equal(group.content[0], model.query_embed.weight)
    assert not torch.equal(group.position[0], group.position[1])


def test_exchanging_two_contents_exchanges_only_which_proposal_has_which() -> None:
    model = two_stage(mixed_query_selection=True)
    assert model.query_embed is not None
    seen: list[QueryGroup] = []
    model.transformer.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    layers(model)
    contents = seen[0].content.clone()
    order = [0, 5, 2, 3, 4, 1, 6]
    with torch.no_grad():
        model.query_embed.weight.copy_(model.query_embed.weight[order].clone())
    layers(model)
    before, after = seen
    assert torch.equal(after.reference, before.reference)
    assert torch.equal(after.position, before.position)
    assert torch.equal(after.content, contents[:, order])
    assert not torch.equal(after.content, contents)


def test_an_image_with_fewer_tokens_than_queries_has_fewer_contents() -> None:
    model = two_stage(mixed_query_selection=True, num_queries=60)
    outputs = model(pad_images(random_images((32, 32))))
    assert 0 < outputs["pred_logits"].shape[1] < 60


@pytest.mark.long
def test_keys_are_those_of_the_plain_model_and_the_contents() -> None:
    plain, mixed = two_stage(), two_stage(mixed_query_selection=True)
    assert {*mixed.state_dict()} - {*plain.state_dict()} == {"query_embed.weight"}
    assert {*plain.state_dict()} == {*two_stage(look_forward_twice=True).state_dict()}


@pytest.mark.parametrize(
    ("name", "needed"),
    [("mixed_query_selection", "two_stage"), ("look_forward_twice", "with_box_refine")],
)
def test_a_switch_without_effect_is_refused(name: str, needed: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: has no effect without `{needed}`"):
        small_config(**{name: True})
