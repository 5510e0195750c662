"""What holds for every recipe and switch of the model, by itself and with others.

A new one adds a line to `CASES`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from configs.schema import LossConfig
from models.build import build_criterion, build_model, compile_model, set_checkpointing
from models.deformable_detr import DeformableDETR
from models.recipes import RECIPES
from models.recipes.denoising import Options as Denoising
from models.recipes.group import Options as Group
from models.recipes.hybrid import Options as Hybrid
from models.recipes.mds import Options as MDS
from models.recipes.mr import Options as Mr
from models.recipes.ms import Options as MS
from tests.lanes import some
from tests.unit.engine.shared_steps import SMALL_DAT, SMALL_DILATEFORMER
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, perturb, random_images, small_config
from util.batch import EffectiveBatch, pad_images

CLASSES = 5
SIZES = [(60, 90), (75, 64)]
DENOISING = Denoising(num_denoising=10)
HYBRID = Hybrid(num_queries_one2many=9, k_one2many=2)
RELATION = {"relation": "previous"}
ONE_LEVEL = {"num_feature_levels": 1}
DETR = {
    **ONE_LEVEL, "encoder_attn": "dense", "decoder_attn": "dense", "input_norm": "none",
    "position_offset": 0.0, "decoder_norm": True,
}  # fmt: skip
LITE = {"encoder_updates": "lite", "enc_layers": 2}
SPARSE = {"encoder_updates": "sparse", "enc_layers": 2}
MSDA = {"hidden_dim": 48, "nheads": 3}
GROUNDING = {"encoder_attn": "enhancer", "decoder_tokens": True}
PLUS_PLUS = {"mixed_query_selection": True, "look_forward_twice": True}
DINO = {
    **PLUS_PLUS, "query_position": "box", "decoder_norm": True, "shared_heads": True,
    "class_proposals": True, "refine_eps": 1e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Options of a model and of its loss."""

    variant: str = "two_stage"
    recipes: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "++": Case(model=PLUS_PLUS),
    "++, last layer alone": Case(model={**PLUS_PLUS, "aux_loss": False}),
    "hybrid": Case(recipes={"hybrid": HYBRID}),
    "hybrid, plain": Case("plain", recipes={"hybrid": HYBRID}),
    "hybrid, ++": Case(recipes={"hybrid": HYBRID}, model=PLUS_PLUS),
    "relation": Case(model=RELATION),
    "relation mds": Case(model={"relation": "mds"}),
    "relation, refine": Case("refine", model=RELATION),
    "relation, ++, hybrid": Case(recipes={"hybrid": HYBRID}, model={**RELATION, **PLUS_PLUS}),
    "relation, denoising": Case(recipes={"denoising": DENOISING}, model=RELATION),
    "relation mds, denoising": Case(recipes={"denoising": DENOISING}, model={"relation": "mds"}),
    "relation, mds": Case(recipes={"mds": MDS()}, model=RELATION),
    "fusion": Case(model={"enc_fusion": "dense"}),
    "relation-detr": Case(
        recipes={"hybrid": replace(HYBRID, hybrid_proposals=True)},
        model={
            **DINO,
            **RELATION,
            "query_position": "scaled_box",
            "shared_heads": False,
            "enc_fusion": "mlp",
        },
        loss={"cls_loss": "vfl"},
    ),
    "softmax": Case(
        "refine",
        model={"scores": "softmax"},
        loss={"cls_loss": "softmax", "match_cost": "probability"},
    ),
    "align": Case(model=DINO, loss={"cls_loss": "ia_bce", "prime_samples": 2}),
    "align, sparse": Case(model=SPARSE, loss={"cls_loss": "ia_bce", "prime_samples": 2}),
    "stable": Case(
        recipes={"denoising": DENOISING},
        model={**DINO, "shared_heads": False, "enc_fusion": "dense"},
        loss={"cls_loss": "position_supervised", "match_cost": "position_modulated"},
    ),
    "denoising without contrast": Case(
        "plain",
        recipes={"denoising": replace(DENOISING, dn_contrast=False)},
        loss={"match_cost": "high_order", "high_order_from": 0.0},
    ),
    "hybrid with proposals, high order": Case(
        recipes={"hybrid": replace(HYBRID, hybrid_proposals=True)},
        loss={"match_cost": "high_order", "high_order_from": 0.0},
    ),
    "lite": Case(model=LITE),
    "lite, plain, fusion": Case("plain", model={**LITE, "enc_fusion": "dense"}),
    "lite, relation, mds": Case(recipes={"mds": MDS()}, model={**LITE, **RELATION}),
    "sparse": Case(model=SPARSE),
    "sparse, plain, fusion": Case("plain", model={**SPARSE, "enc_fusion": "mlp"}),
    "sparse, relation, denoising": Case(
        recipes={"denoising": DENOISING}, model={**SPARSE, **RELATION}
    ),
    "sparse, mds": Case(recipes={"mds": MDS()}, model=SPARSE, loss={"cls_loss": "vfl"}),
    "dense encoder": Case(model={"encoder_attn": "dense"}),
    "dense encoder, one level": Case("plain", model={"encoder_attn": "dense", **ONE_LEVEL}),
    "mswin": Case(model={"encoder_attn": "mswin", "enc_fusion": "dense"}),
    "mswin, deformable": Case("plain", model={"encoder_attn": "mswin+deformable"}),
    "msda, deformable": Case(model={"encoder_attn": "msda+deformable", **MSDA}),
    "dat": Case("plain", model={"encoder_attn": "dat"}),
    "dat, deformable": Case(model={"encoder_attn": "dat+deformable", "dat_stride": 2}),
    "enhancer": Case(model={"encoder_attn": "enhancer"}),
    "enhancer, plain": Case("plain", model={"encoder_attn": "enhancer", "aux_loss": False}),
    "enhancer, grounding": Case(recipes={"hybrid": HYBRID}, model={**DINO, **GROUNDING}),
    "enhancer, ms": Case(recipes={"ms": MS()}, model=GROUNDING),
    "detr": Case(
        "plain",
        model={**DETR, "scores": "softmax"},
        loss={"cls_loss": "softmax", "match_cost": "probability"},
    ),
    "detr, hybrid": Case("plain", recipes={"hybrid": HYBRID}, model=DETR),
    "detr, denoising": Case("plain", recipes={"denoising": DENOISING}, model=DETR),
    "detr of four levels": Case(
        "plain",
        recipes={"group": Group(group_detr=3)},
        model={"decoder_attn": "dense"},
    ),
    "fpn": Case("plain", model={"neck": "fpn"}),
    "hsfpn": Case(model={"neck": "hsfpn", "neck_width": 32}),
    "mds": Case(recipes={"mds": MDS()}, loss={"cls_loss": "vfl"}),
    "mds, plain": Case("plain", recipes={"mds": MDS()}),
    "dino": Case(model=DINO),
    "hybrid, dino": Case(
        recipes={"hybrid": HYBRID}, model={**DINO, "query_position": "scaled_box"}
    ),
    "group, dino": Case(recipes={"group": Group(group_detr=3)}, model=DINO),
    "ms, dino": Case(recipes={"ms": MS()}, model=DINO),
    "mr, dino": Case(recipes={"mr": Mr()}, model=DINO),
    "mds, dino": Case(recipes={"mds": MDS()}, model=DINO),
    "group": Case(recipes={"group": Group(group_detr=3)}),
    "group, plain": Case("plain", recipes={"group": Group(group_detr=3)}),
    "group, ++": Case(
        recipes={"group": Group(group_detr=3)},
        model=PLUS_PLUS,
        loss={"cls_loss": "ia_bce", "union_set": True},
    ),
    "ms": Case(recipes={"ms": MS()}),
    "ms, plain": Case("plain", recipes={"ms": MS()}),
    "ms, ++": Case(recipes={"ms": MS()}, model=PLUS_PLUS, loss={"cls_loss": "vfl"}),
    "ms, last layer alone": Case(recipes={"ms": MS()}, model={"aux_loss": False}),
    "mr": Case(recipes={"mr": Mr()}),
    "mr, plain": Case("plain", recipes={"mr": Mr()}),
    "mr, ++": Case(recipes={"mr": Mr()}, model=PLUS_PLUS, loss={"cls_loss": "giou_focal"}),
    "mr, last layer alone": Case(recipes={"mr": Mr()}, model={"aux_loss": False}),
    "union set": Case(loss={"union_set": True, "cls_loss": "mal"}),
    "dat backbone": Case(model={"backbone": SMALL_DAT, "drop_path": 0.2}),
    "dilateformer backbone": Case("plain", model={"backbone": SMALL_DILATEFORMER}),
    "dcn v1": Case(model={"backbone": "resnet18", "dcn": "v1"}),
    "dcn v2": Case("plain", model={"backbone": "resnet18", "dcn": "v2", "dcn_stages": (4, 5)}),
    "mds, ++": Case(recipes={"mds": MDS()}, model=PLUS_PLUS, loss={"cls_loss": "mal"}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def model_of(case: Case, **options: Any) -> DeformableDETR:
    """Return a perturbed float64 detector in training mode."""
    torch.manual_seed(0)
    options = {
        "backbone": "timm/test_resnet", "dropout": 0.0, "enc_layers": 1, "dec_layers": 2,
        **VARIANTS[case.variant], **case.model, **options,
    }  # fmt: skip
    config = small_config(**options)
    model = build_model(config, num_classes=CLASSES, recipes=case.recipes).double().train()
    perturb(model)
    return model


def gradients(
    case: Case, model: DeformableDETR, counts: tuple[int, ...] = (3, 2)
) -> dict[str, Tensor]:
    """Return gradients of the loss of a random batch; dropout draws the same in every call."""
    model.zero_grad()
    torch.manual_seed(1)
    images = random_images(*SIZES)
    targets = [
        {**target, "image_id": torch.tensor(i)}
        for i, target in enumerate(random_targets(counts, CLASSES))
    ]
    if next(model.parameters()).dtype == torch.float32:
        images = [image.float() for image in images]
    outputs = model(pad_images(images), targets, EffectiveBatch(sum(counts), max(counts)))
    losses = build_criterion(LossConfig(**case.loss))(outputs, targets)
    torch.autograd.backward(losses["loss"])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.long
@pytest.mark.parametrize("counts", some([(3, 2), (0, 9), (0, 0)], (0, 9)))
@cases
def test_every_parameter_learns(case: Case, counts: tuple[int, ...]) -> None:
    model = model_of(case)
    found = gradients(case, model, counts)
    for name, parameter in model.named_parameters():
        assert (name in found) == parameter.requires_grad, name
        assert name not in found or found[name].isfinite().all(), name


@pytest.mark.long
@cases
def test_activations_computed_again_give_the_same_gradients(case: Case) -> None:
    expected = gradients(case, model_of(case, dropout=0.3))
    model = model_of(case, dropout=0.3)
    set_checkpointing(model, ("backbone", "encoder", "decoder"))
    found = gradients(case, model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.long
@cases
def test_in_bfloat16_gradients_are_float32_and_lead_the_same_way(case: Case) -> None:
    model = model_of(case).float()
    expected = gradients(case, model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(case, model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert value.isfinite().all(), name
    # not closer: rounding chooses other proposals and pairs
    heads = [name for name in found if "class_embed" in name]
    ours, theirs = (torch.cat([g[n].flatten() for n in heads]) for g in (found, expected))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.5
    assert 0.5 < ours.norm() / theirs.norm() < 2


@pytest.mark.slow
@cases
def test_it_compiles_once_for_any_number_of_boxes(case: Case) -> None:
    torch.compiler.reset()
    plain, compiled = model_of(case), model_of(case)
    counter = CompileCounter()
    compile_model(compiled, backend=counter)
    for counts in ((3, 2), (0, 5), (1, 1)):
        expected, found = gradients(case, plain, counts), gradients(case, compiled, counts)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert counter.frame_count == 1


@pytest.mark.long
@cases
def test_in_evaluation_nothing_is_left_of_what_only_trains(case: Case) -> None:
    model = model_of(case).eval()
    needed = {name: o for name, o in case.recipes.items() if RECIPES[name].detects}
    bare = model_of(Case(case.variant, needed, case.model)).eval()
    kept = {k: v for k, v in model.state_dict().items() if k in bare.state_dict()}
    bare.load_state_dict(kept)
    batch = pad_images(random_images(*SIZES))
    targets = random_targets((3, 2), CLASSES)
    with torch.no_grad():
        found, expected = model(batch, targets), bare(batch)
    assert [g.name for g in found["groups"]] == [g.name for g in expected["groups"]]
    assert torch.equal(found["pred_logits"], expected["pred_logits"])
    assert torch.equal(found["pred_boxes"], expected["pred_boxes"])
