"""Hybrid matching against a loop over its formulas, and what it leaves as it is."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import LossConfig
from models.build import build_criterion, build_model
from models.deformable_detr import DeformableDETR
from models.groups import Groups, Members
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput, Route
from models.recipes import RECIPES
from models.recipes.hybrid import Hybrid, Options
from models.two_stage import TwoStageTransformer
from models.weights.transfer import load_strict, transfer
from tests.unit.models.definitions import Coefficients, Target, layer_losses, random_targets
from tests.unit.models.small import VARIANTS, group_of, perturb, random_images, small_config
from util.batch import pad_images
from util.classes import Classes
from util.errors import CheckpointError, ConfigError

variants = pytest.mark.parametrize("variant", VARIANTS)
CLASSES = 5
SIZES = [(128, 96), (100, 128)]
OPTIONS = Options(num_queries_one2many=20, k_one2many=3, lambda_one2many=0.5)


def hybrid_model(variant: str, options: Options = OPTIONS, **model_options: Any) -> DeformableDETR:
    """Return a perturbed float64 detector in training mode, without dropout."""
    config = small_config(dropout=0.0, **VARIANTS[variant], **model_options)
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES, recipes={"hybrid": options}).double()
    perturb(model)
    return model.train()


def run(model: DeformableDETR, targets: list[Target]) -> DetectorOutput:
    """Return the outputs for two random images, the same in every call."""
    torch.manual_seed(1)
    outputs: DetectorOutput = model(pad_images(random_images(*SIZES)), targets)
    return outputs


def test_the_recipe_is_found_by_name() -> None:
    assert RECIPES["hybrid"] is Hybrid
    assert Options() == Options(num_queries_one2many=1500, k_one2many=6, lambda_one2many=1.0)
    for wrong in ({"num_queries_one2many": 0}, {"k_one2many": 0}, {"lambda_one2many": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Options(**wrong)


@pytest.mark.long
@variants
def test_losses_are_those_of_targets_repeated(variant: str) -> None:
    targets = random_targets([3, 1], CLASSES)
    outputs = run(hybrid_model(variant), targets)
    losses = build_criterion(LossConfig())(outputs, targets)
    names = ["", "_one2many"] + ["_enc"] * (variant == "two_stage")
    assert [group.name for group in outputs["groups"]] == names
    assert group_of(outputs).logits.shape[2] == 7
    further = group_of(outputs, "_one2many")
    assert further.logits.shape == (3, 2, 20, CLASSES)
    repeated = [{key: torch.cat([value] * 3) for key, value in t.items()} for t in targets]
    coefficients = Coefficients()
    total = losses["loss"].new_zeros(())
    for layer, suffix in enumerate(("_0", "_1", "")):
        # divides by the number of repeated targets, 3 * 4
        wanted = layer_losses(further.logits[layer], further.boxes[layer], repeated, coefficients)
        for name, weight in zip(wanted, coefficients.loss, strict=True):
            value = losses[f"{name}_one2many{suffix}"]
            torch.testing.assert_close(value, 0.5 * wanted[name], rtol=1e-9, atol=1e-12)
            total = total + weight * value
    plain = build_criterion(LossConfig())(
        DetectorOutput(groups=[g for g in outputs["groups"] if g.name != "_one2many"]), targets
    )
    torch.testing.assert_close(losses["loss"], plain["loss"] + total)
    assert {**losses, **plain}.keys() == losses.keys()
    for name in plain.keys() - {"loss"}:
        assert torch.equal(losses[name], plain[name]), name


@pytest.mark.long
@pytest.mark.parametrize(
    ("variant", "mixed"),
    [("plain", False), ("refine", False), ("two_stage", False), ("two_stage", True)],
)
def test_the_queries_that_detect_stay_as_they_are(variant: str, mixed: bool) -> None:
    targets = random_targets([2, 2], CLASSES)
    model = hybrid_model(variant, mixed_query_selection=mixed)
    alone = copy.deepcopy(model)
    alone.recipes.clear()
    with torch.no_grad():
        hybrid, plain = run(model, targets), run(alone, targets)
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(hybrid[name], plain[name], rtol=1e-12, atol=1e-12)
        if variant != "two_stage" or mixed:
            (weight,) = model.recipes.parameters()
            weight.add_(1)
            moved = run(model, targets)
            assert torch.equal(moved["pred_logits"], hybrid["pred_logits"])
            before, after = (group_of(o, "_one2many").logits for o in (hybrid, moved))
            assert not torch.isclose(before, after).all(-1).any()


def test_two_groups_attend_as_under_the_published_mask() -> None:
    torch.manual_seed(0)
    sizes = (300, 1500)
    detecting = torch.arange(sum(sizes)) < sizes[0]
    blocked = detecting[:, None] != detecting
    assert (int(blocked.sum()), blocked.numel()) == (900_000, 3_240_000)
    attention = nn.MultiheadAttention(8, 1, batch_first=True).double()
    query, value = torch.randn(2, 1, sum(sizes), 8, dtype=torch.float64)
    groups = Groups([Members(size, None, False, 1, Route()) for size in sizes])
    with torch.no_grad():
        expected, _ = attention(query, query, value, attn_mask=blocked, need_weights=False)
        torch.testing.assert_close(groups.attend(attention, query, value), expected)


@pytest.mark.long
def test_proposals_that_rank_next_are_its_queries() -> None:
    model = hybrid_model("two_stage")
    targets = random_targets([1, 1], CLASSES)
    outputs = run(model, targets)
    model.transformer.num_queries = 27
    every = run(model, targets)
    scores = group_of(outputs, "_enc").logits[0, ..., 0]
    assert scores.shape[1] > 27
    assert group_of(every, "_one2many").logits.shape[2] == min(20, scores.shape[1] - 27)
    # the last layer's queries start from the same boxes, but attend to each other in two groups
    best = scores.topk(27).indices
    boxes = group_of(outputs, "_enc").boxes[0].gather(1, best[..., None].expand(-1, -1, 4))
    features = model.feature_levels(pad_images(images()))
    transformer = model.transformer
    assert isinstance(transformer, TwoStageTransformer)
    with torch.no_grad():
        started = transformer(
            *features, None,
            lambda memory, proposals: [transformer.from_boxes("", proposals.best(7, 27))],
        )  # fmt: skip
    torch.testing.assert_close(started.groups[1].reference, boxes[:, 7:])


@pytest.mark.long
@pytest.mark.parametrize("classes", [False, True])
def test_proposals_of_its_own_are_those_of_other_heads(classes: bool) -> None:
    options: dict[str, Any] = {"mixed_query_selection": True, "class_proposals": classes}
    own = Options(num_queries_one2many=20, k_one2many=3, hybrid_proposals=True)
    config = small_config(dropout=0.0, num_queries=7, **VARIANTS["two_stage"], **options)
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES, recipes={"hybrid": own}).double().train()
    perturb(model)
    targets = random_targets([3, 0], CLASSES)
    outputs = run(model, targets)
    found = group_of(outputs, "_one2many_enc")
    other = copy.deepcopy(model)
    recipe = other.recipes["hybrid"]
    assert isinstance(recipe, Hybrid)
    heads = recipe.encoder_heads
    assert heads is not None
    other.class_embed[-1], other.bbox_embed[-1] = heads.score, heads.box
    other.query_embed, other.transformer.num_queries = recipe.query_embed, 20
    other.recipes.clear()
    exchanged = run(other, targets)
    for name, theirs in (("_one2many", ""), ("_one2many_enc", "_enc")):
        ours, expected = group_of(outputs, name), group_of(exchanged, theirs)
        torch.testing.assert_close(ours.logits, expected.logits)
        torch.testing.assert_close(ours.boxes, expected.boxes)
    assert found.logits.shape[-1] == (CLASSES if classes else 1)
    # it learns every object three times
    repeated = [{k: v.repeat_interleave(3, dim=0) for k, v in t.items()} for t in targets]
    criterion = build_criterion(LossConfig())
    alone = criterion(DetectorOutput(groups=[group_of(exchanged, "_enc")]), repeated)
    losses = criterion(outputs, targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{name}_one2many_enc"], alone[f"{name}_enc"])


def images() -> list[Tensor]:
    """Return the images of `run`."""
    torch.manual_seed(1)
    return random_images(*SIZES)


@variants
def test_evaluation_leaves_the_recipe_out(variant: str) -> None:
    model = hybrid_model(variant).eval()
    targets = random_targets([1, 1], CLASSES)
    assert all(group.name != "_one2many" for group in run(model, targets)["groups"])
    assert all(group.name != "_one2many" for group in model.train()(pad_images(images()))["groups"])


@variants
def test_keys_are_the_plain_models_and_the_recipes_own(variant: str) -> None:
    model = hybrid_model(variant)
    torch.manual_seed(0)
    plain = build_model(small_config(dropout=0.0, **VARIANTS[variant]), num_classes=CLASSES)
    own = [] if variant == "two_stage" else ["recipes.hybrid.query_embed.weight"]
    assert list(model.state_dict()) == [*plain.state_dict(), *own]
    assert [n for n, _ in model.named_parameters()] == [*dict(plain.named_parameters()), *own]
    torch.manual_seed(0)
    fresh = build_model(
        small_config(dropout=0.0, **VARIANTS[variant]),
        num_classes=CLASSES,
        recipes={"hybrid": OPTIONS},
    ).state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(fresh[name], value), name


@pytest.mark.long
@pytest.mark.parametrize("counts", [[3, 2], [0, 0], [0, 9]])
@variants
def test_every_parameter_learns(variant: str, counts: list[int]) -> None:
    model = hybrid_model(variant)
    targets = random_targets(counts, CLASSES)  # nine of an image, repeated, are more than queries
    losses = build_criterion(LossConfig())(run(model, targets), targets)
    torch.autograd.backward(losses["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_an_image_with_few_tokens_has_the_same_losses_without_objects() -> None:
    model = hybrid_model("two_stage")
    targets = random_targets([2], CLASSES)
    outputs = model(pad_images(random_images((32, 32))), targets)  # 22 tokens
    assert 0 < group_of(outputs, "_one2many").logits.shape[2] < 20
    model.transformer.num_queries = 100
    outputs = model(pad_images(random_images((32, 32))), targets)
    assert group_of(outputs, "_one2many").logits.shape[2] == 0
    losses = build_criterion(LossConfig())(outputs, targets)
    further = {name: value for name, value in losses.items() if "_one2many" in name}
    assert len(further) == 9
    assert not any(further.values())
    torch.autograd.backward(losses["loss"])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.long
def test_parts_of_an_effective_batch_add_up_to_it() -> None:
    targets = random_targets([0, 3, 1], CLASSES)
    criterion = build_criterion(LossConfig())
    recipe = Hybrid(OPTIONS, hybrid_model("plain").transformer, num_classes=CLASSES)
    logits = torch.randn(2, 3, 20, CLASSES, dtype=torch.float64)
    boxes = torch.rand(2, 3, 20, 4, dtype=torch.float64)
    group = GroupOutput("_one2many", logits, boxes, recipe.learning)
    detecting = GroupOutput("", logits, boxes, learning=ONE_TO_ONE)
    outputs = DetectorOutput(groups=[detecting, group])
    whole = criterion(outputs, targets)
    total = dict.fromkeys(whole, torch.zeros(()))
    for part in (slice(1), slice(1, None)):
        groups = [
            replace(g, logits=g.logits[:, part], boxes=g.boxes[:, part]) for g in outputs["groups"]
        ]
        for name, value in criterion(DetectorOutput(groups=groups), targets[part], 4.0).items():
            total[name] = total[name] + value
    for name, value in whole.items():
        torch.testing.assert_close(total[name], value, check_dtype=False, msg=name)


@pytest.mark.long
def test_weights_of_a_plain_model_start_it_and_its_own_start_a_plain_one() -> None:
    hybrid, names = hybrid_model("plain"), tuple("abcde")
    plain = build_model(small_config(dropout=0.0), num_classes=CLASSES).double()
    perturb(plain)
    classes, key = Classes(tuple(range(5)), names), "recipes.hybrid.query_embed.weight"
    before = hybrid.state_dict()[key].clone()
    report = transfer(hybrid, plain.state_dict(), source_classes=classes, target_classes=classes)
    assert report.reinitialised == {key: "not in the checkpoint"}
    state = hybrid.state_dict()
    assert torch.equal(state[key], before)
    other = build_model(small_config(dropout=0.0), num_classes=CLASSES).double()
    report = transfer(other, state, source_classes=classes, target_classes=classes)
    assert report.ignored == {key: "not in the model"}
    assert not report.reinitialised
    for name, value in other.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="query_embed.weight' is missing"):
        load_strict(hybrid, plain.state_dict(), "plain")
    with pytest.raises(CheckpointError, match=f"'{key}' is not in the model"):
        load_strict(plain, state, "hybrid")
