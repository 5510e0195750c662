"""Group DETR against the code of LW-DETR in `transformers`; no group changes another."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LwDetrConfig
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
from transformers.models.lw_detr.modeling_lw_detr import LwDetrAttention

from configs.load import read_options
from configs.schema import Config, LossConfig
from models.build import build_criterion, build_model
from models.decoder import DeformableDecoderLayer
from models.deformable_detr import DeformableDETR
from models.groups import Groups, Members
from models.one_to_many import FurtherHeads
from models.proposals import objects_of_one_class
from models.queries import DetectorOutput, GroupOutput, Learning, Route
from models.recipes import KnownRecipes
from models.recipes.group import Group, Options
from tests.lanes import as_published
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, group_of, perturb, random_images, small_config
from util.batch import pad_images

variants = pytest.mark.parametrize("variant", VARIANTS)
CLASSES, QUERIES, GROUPS = 5, 7, 3
SIZES = [(128, 96), (100, 128)]


def group_model(variant: str, **options: Any) -> DeformableDETR:
    """Return a perturbed float64 detector in training mode, without dropout."""
    config = small_config(dropout=0.0, **VARIANTS[variant], **options)
    recipes = {"group": Options(group_detr=GROUPS)}
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES, recipes=recipes).double()
    perturb(model)
    return model.train()


def run(model: DeformableDETR) -> DetectorOutput:
    """Return the outputs for two random images, the same in every call."""
    torch.manual_seed(1)
    images = pad_images(random_images(*SIZES))
    outputs: DetectorOutput = model(images, random_targets([3, 1], CLASSES))
    return outputs


def random_predictions(layers: int) -> tuple[Tensor, Tensor]:
    """Return logits and boxes of all groups for two images."""
    logits = torch.randn(layers, 2, GROUPS * QUERIES, CLASSES, dtype=torch.float64)
    boxes = torch.rand(layers, 2, GROUPS * QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2
    return logits.requires_grad_(), boxes.requires_grad_()


@pytest.mark.parametrize("counts", [[3, 2], [0, 9]])
def test_losses_are_those_of_lw_detr(counts: list[int]) -> None:
    torch.manual_seed(0)
    targets = [{**t, "labels": t["labels"] * 0} for t in random_targets(counts, CLASSES)]
    logits, boxes = random_predictions(3)  # the first as if of the encoder
    parts = GROUPS - 1
    one = Learning(weight=1 / GROUPS)
    more = Learning(parts=parts, divisor=parts, weight=parts / GROUPS)
    enc = Learning(parts=GROUPS, divisor=GROUPS, targets=objects_of_one_class)
    ours = build_criterion(LossConfig(cls_loss="ia_bce"))(
        DetectorOutput(
            groups=[
                GroupOutput("", logits[1:, :, :QUERIES], boxes[1:, :, :QUERIES], one),
                GroupOutput("_groups", logits[1:, :, QUERIES:], boxes[1:, :, QUERIES:], more),
                GroupOutput("_groups_enc", logits[:1], boxes[:1], enc),
            ]
        ),
        targets,
    )
    matcher = LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    loss_class: Any = LwDetrImageLoss
    criterion = loss_class(matcher, CLASSES, 0.25, ["labels", "boxes"], GROUPS).train()
    outputs = [
        {"logits": layer_logits, "pred_boxes": layer_boxes}
        for layer_logits, layer_boxes in zip(logits, boxes, strict=True)
    ]
    theirs = criterion(
        {**outputs[2], "auxiliary_outputs": [outputs[1]], "enc_outputs": outputs[0]},
        [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets],
    )
    coefficients = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    total = sum(
        weight * theirs[name + suffix]
        for name, weight in coefficients.items()
        for suffix in ("", "_0", "_enc")
    )
    torch.testing.assert_close(ours["loss"], total, rtol=1e-6, atol=1e-6)
    ours_by, theirs_by = (
        torch.autograd.grad(loss, (logits, boxes)) for loss in (ours["loss"], total)
    )
    torch.testing.assert_close(ours_by, theirs_by, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(
    not as_published(transformers.__version__), reason="older transformers: see as_published"
)
def test_attention_is_that_of_lw_detr() -> None:
    torch.manual_seed(0)
    width, heads = 32, 4
    config = LwDetrConfig(
        d_model=width, decoder_self_attention_heads=heads, group_detr=GROUPS, attention_bias=True
    )
    config._attn_implementation = "eager"
    theirs = LwDetrAttention(config, 0).double().train()
    layer = DeformableDecoderLayer(
        width, d_ffn=8, dropout=0.0, n_levels=1, n_heads=heads, n_points=1
    ).double()
    with torch.no_grad():
        projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
        layer.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        layer.self_attn.out_proj.load_state_dict(theirs.o_proj.state_dict())
    x, position = torch.randn(2, 2, GROUPS * QUERIES, width, dtype=torch.float64)
    expected, _ = theirs(x, position_embeddings=position)
    members = Members(GROUPS * QUERIES, None, False, GROUPS, Route())
    attended = Groups([members]).attend(layer.self_attn, x + position, x)
    torch.testing.assert_close(attended, expected)


@variants
def test_no_group_changes_another(variant: str) -> None:
    model = group_model(variant, mixed_query_selection=variant == "two_stage")
    recipe = model.recipes["group"]
    assert isinstance(recipe, Group)
    assert recipe.query_embed is not None
    trained = run(model)
    with torch.no_grad():
        recipe.query_embed.weight[QUERIES:] += 1  # of the second of the further groups
        moved = run(model)
        evaluated = run(model.eval())
    further, later = group_of(trained, "_groups").logits, group_of(moved, "_groups").logits
    assert further.shape == (3, 2, (GROUPS - 1) * QUERIES, CLASSES)
    for other in (moved, evaluated):
        torch.testing.assert_close(other["pred_logits"], trained["pred_logits"])
    torch.testing.assert_close(later[:, :, :QUERIES], further[:, :, :QUERIES])
    assert not torch.isclose(later[:, :, QUERIES:], further[:, :, QUERIES:]).all(-1).any()


def test_each_group_starts_from_what_its_own_heads_propose() -> None:
    model = group_model("two_stage")
    recipe = model.recipes["group"]
    assert isinstance(recipe, Group)
    before = group_of(run(model), "_groups_enc").logits
    assert before.shape == (1, 2, (GROUPS - 1) * QUERIES, 1)
    first, second = before[0, :, :QUERIES], before[0, :, QUERIES:]
    for scores in (first, second):
        assert (scores.diff(dim=1) <= 0).all()
    bias = recipe.get_parameter("encoder_heads.1.score.bias")
    with torch.no_grad():
        bias.add_(1)
    after = group_of(run(model), "_groups_enc").logits
    torch.testing.assert_close(after[0, :, :QUERIES], first)
    torch.testing.assert_close(after[0, :, QUERIES:], second + 1)


def test_sizes_are_the_published_ones() -> None:
    # the published heads have a score for each of 91 classes, ours one
    heads = sum(p.numel() for p in FurtherHeads(256, own_projection=True).parameters())
    assert heads + 90 * (256 + 1) == 222_303
    assert Options().group_detr == 11


def test_one_group_is_the_model_without_the_recipe() -> None:
    values = {"recipes": {"group": {"group_detr": 1}}}
    assert read_options(None, values, KnownRecipes()).config() == Config()
