"""MS-DETR: what its blocks read and predict, and that evaluation leaves them out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import LossConfig
from models.build import build_criterion, build_model
from models.deformable_detr import DeformableDETR
from models.layers import inverse_sigmoid
from models.one_to_many import assign_by_quality
from models.queries import DetectorOutput
from models.recipes.ms import MS, Options
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, group_of, perturb, random_images, small_config
from util.batch import pad_images

CLASSES = 5
SIZES = [(128, 96), (100, 128)]


def ms_model(variant: str = "two_stage", **options: Any) -> DeformableDETR:
    """Return a perturbed float64 detector in training mode, without dropout."""
    config = small_config(dropout=0.0, **VARIANTS[variant], **options)
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES, recipes={"ms": Options()}).double()
    perturb(model)
    return model.train()


def run(model: DeformableDETR) -> DetectorOutput:
    """Return the outputs for two random images, the same in every call."""
    torch.manual_seed(1)
    images = pad_images(random_images(*SIZES))
    outputs: DetectorOutput = model(images, random_targets([3, 1], CLASSES))
    return outputs


def blocks(model: DeformableDETR) -> list[dict[str, Tensor]]:
    """Return the parameters of each layer's block, under their published names."""
    recipe = model.recipes["ms"]
    assert isinstance(recipe, MS)
    return [dict(block.named_parameters()) for block in recipe.layers]


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_predict_from_what_has_only_looked_at_the_image(variant: str, eps: float) -> None:
    model = ms_model(variant, refine_eps=eps)
    looked: list[Tensor] = []
    decoder = model.transformer.decoder
    for layer in decoder.layers:
        layer.get_submodule("norm1").register_forward_hook(lambda *args: looked.append(args[2]))
    outputs = run(model)
    many, detecting = group_of(outputs, "_one2many"), group_of(outputs)
    for i, (x, p) in enumerate(zip(looked, blocks(model), strict=True)):
        hidden = F.linear(x, p["linear3.weight"], p["linear3.bias"]).relu()
        fed = F.linear(hidden, p["linear4.weight"], p["linear4.bias"])
        aside = F.layer_norm(x + fed, x.shape[-1:], p["norm4.weight"], p["norm4.bias"])
        torch.testing.assert_close(many.logits[i], model.class_embed[i](aside))
        if i and variant != "plain":  # a layer starts from the boxes that the last one detects
            start = inverse_sigmoid(detecting.boxes[i - 1].detach(), eps)
            expected = (model.bbox_embed[i](aside) + start).sigmoid()
            torch.testing.assert_close(many.boxes[i], expected)


def test_coefficients_are_the_published_ones() -> None:
    model = ms_model()
    outputs = run(model)
    assert [group.name for group in outputs["groups"]] == ["", "_one2many", "_enc"]
    assert group_of(outputs, "_one2many").learning.assign is assign_by_quality
    assert group_of(outputs, "_enc").learning.anchors is not None
    losses = build_criterion(LossConfig())(outputs, random_targets([3, 1], CLASSES))
    total = losses["loss"].new_zeros(())
    for group, coefficient in (("", 1), ("_one2many", 2)):
        for layer in ("_0", "_1", ""):
            suffix = group + layer
            total = total + coefficient * losses[f"loss_ce{suffix}"]
            total = total + 5 * losses[f"loss_bbox{suffix}"] + 2 * losses[f"loss_giou{suffix}"]
    total = total + 2 * losses["loss_ce_enc"]
    total = total + 5 * losses["loss_bbox_enc"] + 2 * losses["loss_giou_enc"]
    torch.testing.assert_close(losses["loss"], total)


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_learn_wherever_a_block_does(variant: str) -> None:
    model = ms_model(variant, aux_loss=False)
    losses = build_criterion(LossConfig())(run(model), random_targets([3, 1], CLASSES))
    torch.autograd.backward(losses["loss"])
    for heads in (model.class_embed, model.bbox_embed):
        for name, parameter in heads[:3].named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_in_evaluation_no_block_runs() -> None:
    model = ms_model()
    trained = run(model)
    calls: list[str] = []
    recipe = model.recipes["ms"]
    assert isinstance(recipe, MS)
    for block in recipe.layers:
        block.register_forward_hook(lambda *_: calls.append("block"))
    with torch.no_grad():
        evaluated = run(model.eval())
    assert not calls
    assert [group.name for group in evaluated["groups"]] == ["", "_enc"]
    torch.testing.assert_close(evaluated["pred_logits"], trained["pred_logits"])
    torch.testing.assert_close(evaluated["pred_boxes"], trained["pred_boxes"])
    run(model.train())
    assert len(calls) == 3
