"""Relations of boxes, and the bias that they give to attention among queries."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import relations
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.dino_decoder import DinoDecoder
from models.recipes.denoising import Options as Denoising
from models.recipes.hybrid import Options as Hybrid
from models.relations import RelationBias, SymmetricRelationBias, box_relations
from tests.unit.models.definitions import Target, random_targets
from tests.unit.models.small import group_of, perturb, random_images, small_config
from util.batch import pad_images
from util.errors import ConfigError

TWO_STAGE = {"with_box_refine": True, "two_stage": True}


def random_boxes(*shape: int) -> Tensor:
    """Return boxes within the image."""
    return torch.rand(*shape, 4, dtype=torch.float64) * 0.4 + 0.2


def related_model(recipes: dict[str, Any] | None = None, **options: Any) -> DeformableDETR:
    """Return a perturbed float64 model with relations, in training mode."""
    torch.manual_seed(0)
    options = {"relation": "previous", **TWO_STAGE, **options}
    config = small_config(dropout=0.0, **options)
    model = build_model(config, num_classes=5, recipes=recipes).double().train()
    perturb(model)
    return model


def targets_of_two_images() -> list[Target]:
    """Return random targets with two objects and one."""
    targets = random_targets([2, 1], 5)
    return [{**target, "image_id": torch.tensor(i)} for i, target in enumerate(targets)]


def boxes_of(model: DeformableDETR, group: str = "") -> Tensor:
    """Return a group's boxes of every decoder layer, of the same images in every call."""
    torch.manual_seed(1)
    images = pad_images(random_images((96, 128), (128, 80)))
    return group_of(model(images, targets_of_two_images()), group).boxes


def test_relations_are_those_of_the_paper() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.1], [0.6, 0.4, 0.1, 0.3]]], dtype=torch.float64)
    found = box_relations(boxes, boxes)[0]
    assert torch.equal(found[0, 0], torch.zeros(4, dtype=torch.float64))
    expected = torch.tensor(
        [[0.405448, 0.693097, 0.693097, -1.098546], [0.693097, 0.287674, -0.693097, 1.098546]]
    ).double()
    torch.testing.assert_close(torch.stack([found[0, 1], found[1, 0]]), expected, rtol=0, atol=5e-6)


def test_ratios_of_sizes_change_their_sign_with_the_order() -> None:
    a, b = random_boxes(2, 5), random_boxes(2, 3)
    there, back = box_relations(a, b), box_relations(b, a).transpose(1, 2)
    torch.testing.assert_close(there[..., 2:], -back[..., 2:])
    assert not torch.isclose(there[..., :2], back[..., :2]).all()


def bias_by_definition(layer: RelationBias, a: Tensor, b: Tensor) -> Tensor:
    """Return the bias of all heads for a pair of boxes."""
    weight, bias = layer.state_dict()["pos_proj.0.weight"], layer.state_dict()["pos_proj.0.bias"]
    (x, y, w, h), (u, v, s, t) = a.tolist(), b.tolist()
    w_, h_, s_, t_ = (side + 1e-5 for side in (w, h, s, t))
    features = []
    for number in (
        math.log(abs(x - u) / w_ + 1), math.log(abs(y - v) / h_ + 1),
        math.log(w_ / s_), math.log(h_ / t_),
    ):  # fmt: skip
        for k in range(8):
            phase = 100 * number / 10000 ** (2 * k / 16)
            features += [math.sin(phase), math.cos(phase)]
    product: Tensor = weight @ torch.tensor(features).double() + bias
    return product.clamp(min=0)


def test_a_bias_is_what_its_definition_says() -> None:
    torch.manual_seed(0)
    layer = RelationBias(3).double()
    a, b = random_boxes(1, 4), random_boxes(1, 2)
    found = layer(a, b)
    assert layer.state_dict()["pos_proj.0.weight"].shape == (3, 64)
    for i, j in itertools.product(range(4), range(2)):
        expected = bias_by_definition(layer, a[0, i], b[0, j])
        torch.testing.assert_close(found[0, :, i, j], expected)


def test_nothing_is_learned_through_boxes() -> None:
    layer = RelationBias(3).double()
    a, b = random_boxes(1, 4).requires_grad_(), random_boxes(1, 2).requires_grad_()
    bias = layer(a, b)
    assert (bias >= 0).all()
    torch.autograd.backward(bias.sum())
    assert (a.grad, b.grad) == (None, None)


def test_many_pairs_are_worked_on_in_parts_and_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = RelationBias(3).double()
    a, b = random_boxes(2, 7), random_boxes(2, 5)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def run() -> list[Tensor]:
        layer.zero_grad()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            bias = layer(a, b)
        torch.autograd.backward(bias.square().sum())
        return [bias, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    whole = run()
    assert max(kept) == 2 * 7 * 5 * 64
    monkeypatch.setattr(relations, "_PAIRS", 25)  # two of seven rows
    parts = run()
    assert max(kept) < 2 * 7 * 5 * 64
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(a, b), whole[0])


def decoder_of(model: DeformableDETR) -> DinoDecoder:
    """Return the decoder whose boxes see each other."""
    assert isinstance(model.transformer.decoder, DinoDecoder)
    return model.transformer.decoder


def test_a_projection_of_zeros_leaves_attention_as_it_is() -> None:
    model = related_model()
    relation = decoder_of(model).position_relation_embedding
    assert relation is not None
    biased = boxes_of(model)
    for parameter in relation.parameters():
        torch.nn.init.zeros_(parameter)
    unbiased = boxes_of(model)
    decoder_of(model).position_relation_embedding = None
    plain = boxes_of(model)
    torch.testing.assert_close(unbiased, plain)
    assert torch.equal(biased[0], plain[0])  # the first layer has no layer before it
    assert not torch.isclose(biased[1], plain[1]).all()


@pytest.mark.parametrize("two_stage", [True, False])
def test_boxes_given_to_a_layer_attend_to_those_it_found(two_stage: bool) -> None:
    model = related_model(two_stage=two_stage)
    relation = decoder_of(model).position_relation_embedding
    assert relation is not None
    seen: list[tuple[Tensor, Tensor]] = []
    relation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    given: list[Tensor] = []
    model.transformer.decoder.register_forward_pre_hook(
        lambda _, inputs: given.append(inputs[0][0].reference)
    )
    boxes = boxes_of(model)
    assert len(seen) == 2  # of three layers, the first has none
    first = given[0] if two_stage else boxes[0]
    for found, expected in zip(seen, ((first, boxes[0]), (boxes[0], boxes[1])), strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_a_symmetric_bias_is_what_its_definition_says() -> None:
    torch.manual_seed(0)
    layer = SymmetricRelationBias(3).double()
    perturb(layer)
    state = layer.state_dict()
    boxes = random_boxes(1, 4)
    found = layer(random_boxes(1, 4), boxes)

    def one_way(a: Tensor, b: Tensor) -> Tensor:
        (x, y, w, h), (u, v, s, t) = a.tolist(), b.tolist()
        w, h, s, t = (side + 1e-5 for side in (w, h, s, t))
        features = []
        for number in (
            math.log(abs(x - u) / w + 1), math.log(abs(y - v) / h + 1),
            math.log(w / s), math.log(h / t),
        ):  # fmt: skip
            for k in range(16):
                phase = number / 10000 ** (k / 16)
                features += [math.sin(phase), math.cos(phase)]
        first, second = (
            (state[f"relation.layers.{i}.weight"], state[f"relation.layers.{i}.bias"])
            for i in range(2)
        )
        hidden = (first[0] @ torch.tensor(features).double() + first[1]).clamp(min=0)
        output: Tensor = second[0] @ hidden + second[1]
        return output

    for i in range(4):
        for j in range(4):
            a, b = boxes[0, i], boxes[0, j]
            expected = (one_way(a, b) + one_way(b, a)) / 2
            torch.testing.assert_close(found[0, :, i, j], expected)


def test_in_the_last_layer_alone_it_starts_as_plain_attention() -> None:
    torch.manual_seed(0)
    config = small_config(dropout=0.0, relation="mds", **TWO_STAGE)
    model = build_model(config, num_classes=5).double().train()
    relation = decoder_of(model).position_relation_embedding
    assert isinstance(relation, SymmetricRelationBias)
    assert not any(p.any() for p in relation.relation.layers[1].parameters())
    perturb(model)
    biased = boxes_of(model)
    relation.reset_parameters()
    unbiased = boxes_of(model)
    decoder_of(model).position_relation_embedding = None
    plain = boxes_of(model)
    torch.testing.assert_close(unbiased, plain)
    assert torch.equal(biased[:-1], plain[:-1])
    assert not torch.isclose(biased[-1], plain[-1]).all()


def test_queries_of_a_recipe_attend_without_relations() -> None:
    model = related_model({"hybrid": Hybrid(num_queries_one2many=9, k_one2many=2)})
    related = boxes_of(model, "_one2many")
    decoder_of(model).position_relation_embedding = None
    assert torch.equal(boxes_of(model, "_one2many"), related)


@pytest.mark.parametrize("two_stage", [True, False])
def test_denoising_queries_attend_by_how_boxes_lie(two_stage: bool) -> None:
    """To each other and to those that detect, as in Relation-DETR's code; not to other groups."""
    model = related_model({"denoising": Denoising(num_denoising=4)}, two_stage=two_stage)
    relation = decoder_of(model).position_relation_embedding
    assert isinstance(relation, RelationBias)
    masks: list[Tensor] = []
    for layer in model.transformer.decoder.layers:
        layer.get_submodule("self_attn").register_forward_pre_hook(
            lambda _, inputs, named: masks.append(named["attn_mask"]), with_kwargs=True
        )
    starts: list[Tensor] = []
    model.transformer.decoder.register_forward_pre_hook(
        lambda _, inputs: starts.append(inputs[0][1].reference)
    )
    torch.manual_seed(1)
    images = pad_images(random_images((96, 128), (128, 80)))
    output = model(images, targets_of_two_images())
    detecting, denoising = group_of(output).boxes, group_of(output, "_dn").boxes
    queries, slots = detecting.shape[2], denoising.shape[2]
    assert slots == 8  # two groups of two objects, positive and negative
    assert masks[1].shape == (slots, queries + slots)  # of the first layer: who sees whom
    blocked = masks[1]
    for index in (1, 2):
        bias = masks[2 * index + 1].view(2, -1, slots, queries + slots)  # [N,heads,P,Q+P]
        before = starts[0] if index == 1 else denoising[index - 2]
        if before.shape[-1] == 2:
            before = denoising[0]
        columns = torch.cat([detecting[index - 1], denoising[index - 1]], dim=1)
        pairs = itertools.product(range(2), range(slots), range(queries + slots))
        for image, i, j in pairs:
            expected = bias_by_definition(relation, before[image, i], columns[image, j])
            if blocked[i, j]:
                expected = torch.full_like(expected, -math.inf)
            torch.testing.assert_close(bias[image, :, i, j], expected)
    assert any((masks[2 * index + 1] > 0).any() for index in (1, 2))


@pytest.mark.parametrize("relation", ["previous", "mds"])
def test_queries_that_detect_do_not_depend_on_denoising(relation: str) -> None:
    alone = related_model(relation=relation)
    model = related_model({"denoising": Denoising(num_denoising=4)}, relation=relation)
    beside = model.state_dict()
    alone.load_state_dict({key: beside[key] for key in alone.state_dict()})
    torch.testing.assert_close(boxes_of(model), boxes_of(alone))
    without = boxes_of(model, "_dn")
    decoder_of(model).position_relation_embedding = None
    plain = boxes_of(model, "_dn")
    assert torch.equal(without[0], plain[0])
    assert not torch.isclose(without[-1], plain[-1]).all()


def test_a_symmetric_bias_of_the_last_boxes_is_a_part_of_that_of_all() -> None:
    torch.manual_seed(0)
    layer = SymmetricRelationBias(3).double()
    perturb(layer)
    boxes = random_boxes(2, 6)
    whole, part = layer(boxes, boxes), layer(boxes[:, -2:], boxes)
    torch.testing.assert_close(part, whole[:, :, -2:])


def test_what_is_blocked_stays_blocked() -> None:
    model = related_model().eval()
    decoder = model.transformer.decoder
    changed = torch.zeros(1, 7, 64, dtype=torch.float64)
    changed[:, 0] = 1.0

    def decoded(change: Tensor) -> Tensor:
        blocked = torch.zeros(7, 7, dtype=torch.bool)
        blocked[1:, 0] = True  # nobody sees the first query

        def pre(_: Any, inputs: Any) -> Any:
            (group, *others), *rest = inputs
            group = replace(group, content=group.content + change, blocked=blocked)
            return ([group, *others], *rest)

        handle = decoder.register_forward_pre_hook(pre)
        boxes = boxes_of(model)
        handle.remove()
        return boxes

    before, after = decoded(0 * changed), decoded(changed)
    assert torch.equal(before[:, :, 1:], after[:, :, 1:])
    assert not torch.isclose(before[:, :, 0], after[:, :, 0]).all()


def test_its_parameters_have_the_published_keys() -> None:
    plain = build_model(small_config(**TWO_STAGE), num_classes=5)
    prefix = "transformer.decoder.position_relation_embedding.pos_proj.0"
    more = {*related_model().state_dict()} - {*plain.state_dict()}
    assert more == {f"{prefix}.weight", f"{prefix}.bias"}


@pytest.mark.parametrize("options", [{}, {"with_box_refine": True, "dec_layers": 1}])
def test_without_boxes_of_a_layer_before_it_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="relation: needs the boxes of an earlier layer"):
        small_config(relation="previous", **options)
