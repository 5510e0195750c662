"""Mr. DETR: its two ways are detectors with other parts, built here by exchanging these parts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import LossConfig
from models.build import build_criterion, build_model
from models.deformable_detr import DeformableDETR
from models.queries import DetectorOutput, GroupOutput
from models.recipes.mr import Mr, Options, OwnParts
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, group_of, perturb, random_images, small_config
from util.batch import pad_images

CLASSES = 5
SIZES = [(128, 96), (100, 128)]
CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "++": {**VARIANTS["two_stage"], "mixed_query_selection": True, "look_forward_twice": True},
    "proposals of classes": {**VARIANTS["two_stage"], "class_proposals": True},
}
models = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())


class Prepending(nn.Module):
    """Self-attention as published: tokens before queries, keys and values, cut off its output."""

    def __init__(self, attention: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.tokens = tokens

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Shape: [N,Q,C] each -> the same."""
        content, position = (t[None].expand(len(q), -1, -1) for t in self.tokens)
        q, k = (torch.cat([content + position, t], dim=1) for t in (q, k))
        output, _ = self.attention(q, k, torch.cat([content, v], dim=1), **options)
        return output[:, content.shape[1] :], None


def mr_model(options: dict[str, Any]) -> DeformableDETR:
    """Return a perturbed float64 detector in training mode, without dropout."""
    torch.manual_seed(0)
    model = build_model(
        small_config(dropout=0.0, **options),
        num_classes=CLASSES,
        recipes={"mr": Options(mr_tokens=4)},
    ).double()
    perturb(model)
    return model.train()


def recipe_of(model: DeformableDETR) -> Mr:
    recipe = model.recipes["mr"]
    assert isinstance(recipe, Mr)
    return recipe


def run(model: DeformableDETR) -> DetectorOutput:
    """Return the outputs for two random images, the same in every call."""
    torch.manual_seed(1)
    images = pad_images(random_images(*SIZES))
    outputs: DetectorOutput = model(images, random_targets([3, 1], CLASSES))
    return outputs


def assert_same(found: GroupOutput, expected: GroupOutput) -> None:
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.boxes, expected.boxes)


@models
def test_one_way_has_feed_forward_blocks_of_its_own(options: dict[str, Any]) -> None:
    model = mr_model(options)
    outputs = run(model)
    other = copy.deepcopy(model)
    for layer, own in zip(other.transformer.decoder.layers, recipe_of(other).layers, strict=True):
        assert isinstance(own, OwnParts)
        layer.linear1, layer.linear2 = own.feed_forward.linear1, own.feed_forward.linear2
    other.recipes.clear()
    assert_same(group_of(outputs, "_sep"), group_of(run(other)))
    assert not torch.isclose(group_of(outputs, "_sep").logits, group_of(outputs).logits).any()


@pytest.mark.long
@models
def test_the_other_way_has_tokens_and_proposals_of_its_own(options: dict[str, Any]) -> None:
    model = mr_model(options)
    outputs = run(model)
    other = copy.deepcopy(model)
    transformer, recipe = other.transformer, recipe_of(other)
    for layer, own in zip(transformer.decoder.layers, recipe.layers, strict=True):
        assert isinstance(own, OwnParts)
        layer.self_attn = Prepending(layer.get_submodule("self_attn"), own.tokens)
        layer.norm2 = own.norm
    if options.get("two_stage"):
        heads = recipe.encoder_heads
        assert heads is not None
        other.class_embed[-1], other.bbox_embed[-1] = heads.score, heads.box
        encoder = group_of(outputs, "_one2many_enc")
        assert_same(encoder, group_of(run(without_recipes(other)), "_enc"))
    expected = run(without_recipes(other))
    assert_same(group_of(outputs, "_one2many"), group_of(expected))


def without_recipes(model: DeformableDETR) -> DeformableDETR:
    model.recipes.clear()
    return model


@models
def test_what_detects_is_the_model_without_it(options: dict[str, Any]) -> None:
    model = mr_model(options)
    trained = run(model)
    plain = run(without_recipes(copy.deepcopy(model)).eval())
    torch.testing.assert_close(trained["pred_logits"], plain["pred_logits"])
    torch.testing.assert_close(trained["pred_boxes"], plain["pred_boxes"])


def test_tokens_learn_from_their_own_way_alone() -> None:
    model = mr_model(VARIANTS["two_stage"])
    outputs, targets = run(model), random_targets([3, 1], CLASSES)
    others = [group for group in outputs["groups"] if not group.name.startswith("_one2many")]
    assert [group.name for group in others] == ["", "_sep", "_enc"]
    losses = build_criterion(LossConfig())(DetectorOutput(groups=others), targets)
    torch.autograd.backward(losses["loss"])
    named = dict(recipe_of(model).named_parameters())
    learned = {name for name, p in named.items() if p.grad is not None and p.grad.any()}
    assert learned == {name for name in named if "feed_forward" in name}
    own = DetectorOutput(groups=[group_of(run(model), "_one2many")])
    torch.autograd.backward(build_criterion(LossConfig())(own, targets)["loss"])
    assert all(named[f"layers.{i}.tokens"].grad.abs().min() > 0 for i in range(3))  # type: ignore[union-attr]


@pytest.mark.parametrize("case", ["two_stage", "proposals of classes"])
def test_coefficients_are_the_published_ones(case: str) -> None:
    outputs = run(mr_model(CASES[case]))
    losses = build_criterion(LossConfig())(outputs, random_targets([3, 1], CLASSES))
    for name in ("_enc", "_one2many_enc"):
        assert group_of(outputs, name).learning.anchors is not None
    total = losses["loss"].new_zeros(())
    suffixes = {
        **{group + layer: 1 for group in ("", "_sep", "_one2many") for layer in ("_0", "_1", "")},
        "_enc": 3,
        "_one2many_enc": 3,
    }
    for suffix, factor in suffixes.items():
        total = total + factor * (
            2 * losses[f"loss_ce{suffix}"]
            + 5 * losses[f"loss_bbox{suffix}"]
            + 2 * losses[f"loss_giou{suffix}"]
        )
    torch.testing.assert_close(losses["loss"], total)
