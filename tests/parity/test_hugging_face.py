"""Predictions, losses and gradients beside those of transformers, in float64 with random weights.

Where theirs differs from the published implementation, and so from ours:
- the sine embedding of two-stage proposals is float32 in every model (replaced here by the formula
  in float64, so that the rest can be compared exactly);
- a two-stage model may take padding for a proposal, as the published one does; ours never does;
- a fresh refining model shares one class head among its layers (undone here); one that is loaded
  from a file with different heads does not;
- there is no loss on the encoder of a two-stage model, and the class loss weighs 1, not 2;
- the matcher's class cost weighs 1 by default (set to 2 here), its alpha and gamma are fixed;
- `cardinality_error` counts scores above a half; we do not report it;
- a backbone's batch norm is replaced by a frozen one even where timm fused an activation into it,
  which is lost (EfficientNet, MobileNet); only ResNets can be compared.
"""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import LossConfig
from models.build import build_criterion, build_model
from models.deformable_detr import DeformableDETR
from models.queries import DetectorOutput
from models.weights.hugging_face import to_official
from models.weights.transfer import load_strict
from tests.unit.models.definitions import Target, random_targets
from tests.unit.models.small import VARIANTS, group_of, perturb, random_images, small_config
from util.batch import PaddedBatch, pad_images

transformers = pytest.importorskip("transformers")

CLASSES = 5
COUNTS = {
    "unequal": [3, 1],
    "one image without": [0, 4],
    "none at all": [0, 0],
    "more than queries": [9, 2],
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@dataclass(frozen=True)
class Pair:
    """Two models with the same weights and an input with padding on both images."""

    theirs: Any
    ours: DeformableDETR
    options: dict[str, Any]
    batch: PaddedBatch

    def run_theirs(self, targets: list[Target] | None = None) -> Any:
        """Return their output, with losses if targets are given."""
        labels = None
        if targets is not None:
            labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        return self.theirs(self.batch.images, pixel_mask=(~self.batch.mask).long(), labels=labels)


def proposal_embedding_float64(logits: Tensor) -> Tensor:
    """Embed proposals by the formula, number by number."""
    features = []
    for number, i in itertools.product(range(4), range(32)):
        angle = logits[..., number].sigmoid() * 2 * math.pi / 10000 ** (2 * (i // 2) / 32)
        features.append(angle.cos() if i % 2 else angle.sin())
    return torch.stack(features, dim=-1)


def their_model(variant: str) -> Any:
    """Return a perturbed float64 model of the size of `small_config`."""
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=True, backbone="resnet18", d_model=64, encoder_layers=2,
        decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
        decoder_attention_heads=4, num_queries=7, two_stage_num_proposals=7, encoder_n_points=2,
        decoder_n_points=3, num_labels=CLASSES, auxiliary_loss=True, class_cost=2,
        **VARIANTS[variant],
    )  # fmt: skip
    model = transformers.DeformableDetrForObjectDetection(config).double().eval()
    if variant == "refine":
        model.class_embed = torch.nn.ModuleList(copy.deepcopy(h) for h in model.class_embed)
    perturb(model)
    if variant == "two_stage":
        model.model.get_proposal_pos_embed = proposal_embedding_float64
    return model


@torch.no_grad()
def favour_padding(model: Any, amount: float) -> None:
    """Raise the object score of masked tokens, which all have one embedding, by `amount`."""
    inner = model.model
    masked = inner.enc_output_norm(inner.enc_output.bias)
    head = inner.decoder.class_embed[-1]
    head.weight[0] += amount * masked / masked.square().sum()


def make_pair(variant: str, padding_score: float = -8.0) -> Pair:
    """Return both models; by default no padded token scores well enough to be a proposal."""
    torch.manual_seed(1)
    theirs = their_model(variant)
    if variant == "two_stage":
        favour_padding(theirs, padding_score)
    options = VARIANTS[variant] | {"backbone": "resnet18"}
    ours = build_model(small_config(**options), num_classes=CLASSES).double().eval()
    full = {"with_box_refine": False, "two_stage": False, "dec_layers": 3} | options
    load_strict(ours, to_official(theirs.state_dict(), full, "theirs"), "theirs")
    return Pair(theirs, ours, full, pad_images(random_images((40, 72), (64, 48))))


@pytest.fixture(scope="module")
def pairs() -> Mapping[str, Pair]:
    """Return both models of every variant."""
    return {variant: make_pair(variant) for variant in VARIANTS}


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Compare relative to the largest value."""
    scale = max(float(theirs.detach().abs().max()), 1e-12)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-9 * scale)


@variants
def test_every_decoder_layer(pairs: Mapping[str, Pair], variant: str) -> None:
    pair = pairs[variant]
    with torch.no_grad():
        theirs = pair.run_theirs(random_targets([1, 1], CLASSES))
        ours = pair.ours(pair.batch)
    layers = [*theirs.auxiliary_outputs, {"logits": theirs.logits, "pred_boxes": theirs.pred_boxes}]
    detecting = group_of(ours)
    assert len(layers) == len(detecting.logits) == 3
    for index, layer in enumerate(layers):
        assert_near(detecting.logits[index], layer["logits"])
        assert_near(detecting.boxes[index], layer["pred_boxes"])
    if variant == "two_stage":
        encoder = group_of(ours, "_enc")
        assert_near(encoder.logits[0], theirs.enc_outputs_class)
        assert_near(encoder.boxes[0], theirs.enc_outputs_coord_logits.sigmoid())


def test_the_weights_leave_nothing_trivial(pairs: Mapping[str, Pair]) -> None:
    with torch.no_grad():
        for pair in pairs.values():
            output = pair.ours(pair.batch)
            assert output["pred_logits"].std(dim=1).min() > 1e-2
            assert output["pred_boxes"].std(dim=1).min() > 1e-3


def test_float32_proposal_embedding_of_theirs_differs_in_rounding_alone() -> None:
    pair = make_pair("two_stage")
    with torch.no_grad():
        exact = pair.run_theirs().logits
        del pair.theirs.model.get_proposal_pos_embed  # their own method shows again
        rounded = pair.run_theirs().logits
        assert 0 < (exact - rounded).abs().max() < 1e-4
        torch.testing.assert_close(pair.ours(pair.batch)["pred_logits"], rounded, rtol=0, atol=1e-4)


def test_padding_becomes_a_proposal_of_theirs_but_not_of_ours() -> None:
    pair = make_pair("two_stage", padding_score=100.0)
    features, masks, pos = pair.ours.feature_levels(pair.batch)
    with torch.no_grad():
        theirs = pair.run_theirs().init_reference_points
        ours = pair.ours.transformer(features, masks, pos, None).decoder.references[0]
    assert (theirs == 1).all(-1).all()  # infinite logits
    assert (ours < 0.99).all()


def weighted(losses: Mapping[str, Tensor], class_weight: float) -> Tensor:
    """Sum the losses of the decoder with the weights theirs uses."""
    weights = {"loss_ce": class_weight, "loss_bbox": 5.0, "loss_giou": 2.0}
    terms = [
        weights["_".join(name.split("_")[:2])] * value
        for name, value in losses.items()
        if name.startswith("loss_") and not name.endswith("_enc")
    ]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@variants
def test_losses_and_gradients(pairs: Mapping[str, Pair], variant: str, counts: list[int]) -> None:
    pair = pairs[variant]
    targets = random_targets(counts, CLASSES)
    theirs = pair.run_theirs(targets)
    output: DetectorOutput = pair.ours(pair.batch)
    ours = build_criterion(LossConfig())(output, targets)
    compared = {name for name in theirs.loss_dict if "cardinality" not in name}
    assert compared == {n for n in ours if n.startswith("loss_") and not n.endswith("_enc")}
    for name in compared:
        assert_near(ours[name], theirs.loss_dict[name])
    total = weighted(ours, class_weight=1.0)
    assert_near(total, theirs.loss)

    parameters = dict(pair.ours.named_parameters())
    for model in (pair.ours, pair.theirs):
        model.zero_grad()
    torch.autograd.backward(total)
    torch.autograd.backward(theirs.loss)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in pair.theirs.named_parameters(remove_duplicate=False)
    }
    expected = to_official(gradients, pair.options, "their gradients")
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            scale = max(float(expected[name].abs().max()), 1e-6 * largest)
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-7 * scale, msg=name)
