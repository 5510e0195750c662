"""Contrastive denoising against loops over its formulas, and what it leaves as it is."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers.loss.loss_rt_detr import RTDetrLoss
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from configs.schema import LossConfig
from models.build import build_criterion, build_model, set_checkpointing
from models.deformable_detr import DeformableDETR
from models.groups import groups_in_layer
from models.queries import ONE_TO_ONE, DetectorOutput, QueryGroup
from models.recipes.denoising import Denoising, Noised, Options
from models.recipes.hybrid import Options as HybridOptions
from models.recipes.mds import Options as MDSOptions
from models.weights.transfer import transfer
from tests.unit.models.definitions import Coefficients, Target, focal, giou, random_targets
from tests.unit.models.small import VARIANTS, group_of, perturb, random_images, small_config
from util.batch import EffectiveBatch, pad_images
from util.classes import Classes
from util.errors import ConfigError

variants = pytest.mark.parametrize("variant", VARIANTS)
CLASSES = 5
SIZES = [(128, 96), (100, 128)]
OPTIONS = Options(num_denoising=7)


def targets_of(counts: Sequence[int], *, classes: int = CLASSES) -> list[Target]:
    """Return random targets of images 10, 11, ..."""
    return [
        {**target, "image_id": torch.tensor(10 + i)}
        for i, target in enumerate(random_targets(counts, classes))
    ]


def denoising_model(
    variant: str, options: Options = OPTIONS, dropout: float = 0.0, **others: Any
) -> DeformableDETR:
    """Return a perturbed float64 detector in training mode."""
    recipes = {**others, "denoising": options}
    config = small_config(dropout=dropout, **VARIANTS[variant])
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES, recipes=recipes).double()
    perturb(model)
    return model.train()


def run(
    model: DeformableDETR, targets: list[Target], whole: EffectiveBatch | None = None
) -> DetectorOutput:
    """Return the outputs for two random images, the same in every call."""
    torch.manual_seed(1)
    outputs: DetectorOutput = model(pad_images(random_images(*SIZES)), targets, whole)
    return outputs


def noised(
    options: Options,
    targets: list[Target],
    *,
    whole: EffectiveBatch | None = None,
    fixed_sizes: bool = False,
    classes: int = CLASSES,
) -> Noised:
    """Return what a recipe of these options makes of targets."""
    torch.manual_seed(0)
    transformer = build_model(small_config(), num_classes=classes).transformer
    recipe = Denoising(options, transformer, num_classes=classes).double()
    whole = whole or EffectiveBatch.of(targets)
    return recipe.prepare(targets, whole, fixed_sizes=fixed_sizes)


def whole_mask(prepared: Noised, detecting: int) -> Tensor:
    """Return which query must not see which, those of denoising first as in other programs."""
    size = len(prepared.blocked)
    none = torch.zeros(1, detecting, 8)
    first = QueryGroup("", none, none, none, learning=ONE_TO_ONE)
    nothing = torch.zeros(1, size, 8)
    group = QueryGroup(
        "_dn", nothing, nothing, nothing, ONE_TO_ONE, prepared.blocked, sees_detecting=True
    )
    rows = groups_in_layer([first, group], 0).members[1].mask
    assert rows is not None
    mask = torch.zeros(size + detecting, size + detecting, dtype=torch.bool)
    mask[size:, :size] = True
    mask[:size] = torch.cat([rows[:, detecting:], rows[:, :detecting]], dim=1)
    return mask


@pytest.mark.parametrize(
    ("most", "groups", "slots"),
    [(0, 1, 0), (1, 100, 200), (3, 33, 198), (7, 14, 196), (40, 2, 160), (100, 1, 200),
     (101, 1, 202), (250, 1, 500)],
)  # fmt: skip
def test_the_number_of_groups_follows_the_image_with_most_boxes(
    most: int, groups: int, slots: int
) -> None:
    prepared = noised(Options(), targets_of([most, 0]))
    assert prepared.learning.divisor == groups
    assert prepared.labels.shape == (2, slots) == prepared.boxes.shape[:2]
    assert prepared.learning.size == slots
    alone = noised(Options(dn_contrast=False), targets_of([most, 0]))
    assert (alone.learning.divisor, alone.labels.shape[1]) == (groups, slots // 2)
    # of a part of a batch, the whole counts
    part = noised(Options(), targets_of([0, most // 2]), whole=EffectiveBatch(most, most))
    assert part.labels.shape == (2, slots)


def test_a_small_number_is_not_the_number_of_groups() -> None:
    assert noised(Options(num_denoising=25), targets_of([10])).labels.shape == (1, 40)


@pytest.mark.parametrize(
    ("most", "number", "groups", "blocked"), [(3, 8, 2, 120), (3, 99, 33, 38_808)]
)
def test_how_many_pairs_are_blocked(most: int, number: int, groups: int, blocked: int) -> None:
    prepared = noised(Options(num_denoising=number), targets_of([most, 1]))
    assert prepared.learning.divisor == groups
    assert int(whole_mask(prepared, 4).sum()) == blocked


@pytest.mark.parametrize("counts", [[3, 0, 1], [1], [4, 4], [12, 7]])
@pytest.mark.parametrize("number", [1, 9, 100])
def test_slots_mask_and_pairs_are_those_of_transformers(counts: list[int], number: int) -> None:
    targets = targets_of(counts)
    theirs = [{"class_labels": t["labels"], "boxes": t["boxes"].float()} for t in targets]
    labels, boxes, mask, meta = get_contrastive_denoising_training_group(  # type: ignore[no-untyped-call]
        theirs, CLASSES, 6, lambda classes: classes, number, 0.0, 0.0
    )
    options = Options(num_denoising=number, dn_label_noise=0, dn_box_noise=0)
    prepared = noised(options, targets)
    assert prepared.labels.equal(labels.long())
    full = prepared.labels != CLASSES
    torch.testing.assert_close(prepared.boxes[full], boxes[full], check_dtype=False)
    assert prepared.boxes[~full].eq(0.5).all()
    assert whole_mask(prepared, 6).equal(mask.isneginf())
    assert prepared.learning.divisor == meta["dn_num_group"]
    matches = prepared.learning.matches
    assert matches is not None
    pairs = RTDetrLoss.get_cdn_matched_indices(meta, theirs)  # type: ignore[no-untyped-call]
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
    assert matches.image.equal(image)
    assert matches.query[0].equal(torch.cat([q for q, _ in pairs]))
    assert matches.target[0].equal(torch.cat([t for _, t in pairs]))


def test_noise_is_as_large_and_as_frequent_as_asked_for() -> None:
    classes = 4
    targets = targets_of([40], classes=classes)
    # in the middle of the image, where nothing is cut
    targets[0]["boxes"] = torch.rand(40, 4, dtype=torch.float64) * 0.1 + torch.tensor(
        [0.4, 0.4, 0.1, 0.1]
    )
    options = Options(num_denoising=4000, dn_label_noise=0.5, dn_box_noise=0.8)
    prepared = noised(options, targets, classes=classes)
    labels = prepared.labels.reshape(100, 2, 40)
    assert labels.max() == classes - 1
    changed = (labels != targets[0]["labels"]).double().mean((0, 2))
    # a quarter is drawn anew, of which a quarter is as before
    torch.testing.assert_close(changed, torch.full_like(changed, 0.25 * 0.75), rtol=0, atol=0.02)
    half = (targets[0]["boxes"][:, 2:] / 2).repeat(1, 2)
    before = box_convert(targets[0]["boxes"], "cxcywh", "xyxy")
    after = box_convert(prepared.boxes.reshape(100, 2, 40, 4), "cxcywh", "xyxy")
    moved = (after[:, 0] - before) / (half * 0.8)
    assert moved.abs().max() <= 1 + 1e-9
    for part in (moved.abs(), moved > 0):  # evenly, in both directions
        mean = part.double().mean((0, 1))
        torch.testing.assert_close(mean, torch.full_like(mean, 0.5), rtol=0, atol=0.03)
    far = noised(Options(num_denoising=4000, dn_box_noise=0.4), targets, classes=classes)
    after = box_convert(far.boxes.reshape(100, 2, 40, 4), "cxcywh", "xyxy")
    moved = ((after[:, 1] - before) / (half * 0.4)).abs()  # 0.8 at most: no corner passes another
    assert moved.min() >= 1 - 1e-9
    assert moved.max() <= 2 + 1e-9
    torch.testing.assert_close(moved.mean(), moved.new_tensor(1.5), rtol=0, atol=0.01)


def test_boxes_stay_boxes_within_the_image() -> None:
    prepared = noised(Options(num_denoising=500, dn_box_noise=10), targets_of([9]))
    corners = box_convert(prepared.boxes, "cxcywh", "xyxy")
    assert corners.min() >= -1e-12
    assert corners.max() <= 1 + 1e-12
    assert prepared.boxes[..., 2:].min() >= 0


def test_draws_depend_on_seed_epoch_and_image_alone() -> None:
    targets = targets_of([3, 2, 4])
    whole = EffectiveBatch(9, 4, seed=3, epoch=2)
    together = noised(OPTIONS, targets, whole=whole)
    torch.manual_seed(99)
    apart = [noised(OPTIONS, [target], whole=whole) for target in reversed(targets)]
    for name in ("labels", "boxes"):
        found = torch.cat([getattr(part, name) for part in reversed(apart)])
        assert getattr(together, name).equal(found)
    other = [
        EffectiveBatch(9, 4, seed=4, epoch=2),
        EffectiveBatch(9, 4, seed=3, epoch=3),
    ]
    for changed in other:
        assert not torch.isclose(
            noised(OPTIONS, targets, whole=changed).boxes, together.boxes
        ).all()
    renamed = [{**t, "image_id": torch.tensor(-5)} for t in targets]
    assert not torch.isclose(noised(OPTIONS, renamed, whole=whole).boxes, together.boxes).all()


@variants
def test_the_queries_that_detect_stay_as_they_are(variant: str) -> None:
    targets = targets_of([2, 1])
    model = denoising_model(variant)
    alone = copy.deepcopy(model)
    alone.recipes.clear()
    with torch.no_grad():
        both, plain = run(model, targets), run(alone, targets)
        for mine, other in zip(group_of(both).logits, group_of(plain).logits, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both["pred_boxes"], plain["pred_boxes"], rtol=1e-12, atol=1e-12)
        first = group_of(both, "_dn").logits
        model.recipes["denoising"].label_enc.weight.add_(1)  # type: ignore[union-attr,operator]
        moved = run(model, targets)
        assert moved["pred_logits"].equal(both["pred_logits"])
        assert not torch.isclose(first, group_of(moved, "_dn").logits).all(-1).any()


@variants
def test_a_group_sees_itself_and_the_queries_that_detect(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, targets = denoising_model(variant), targets_of([2, 1])
    recipe = model.recipes["denoising"]
    assert isinstance(recipe, Denoising)
    prepared = recipe.prepare(targets, EffectiveBatch.of(targets), fixed_sizes=False)
    assert prepared.labels.shape == (2, 12)  # of three groups of 4
    with torch.no_grad():
        before = run(model, targets)
        monkeypatch.setattr(recipe, "prepare", lambda *_, **__: prepared)
        prepared.boxes[:, 4:8] *= 0.9
        after = run(model, targets)
        first, second = (group_of(outputs, "_dn").logits for outputs in (before, after))
        same = torch.isclose(first, second, rtol=1e-12, atol=1e-12).all(-1).all(0).all(0)
        assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 4
        if model.query_embed is not None:
            model.query_embed.weight.add_(torch.randn_like(model.query_embed.weight))
            assert not torch.isclose(group_of(run(model, targets), "_dn").logits, second).any()


@variants
def test_losses_are_those_of_fixed_pairs(variant: str) -> None:
    targets = targets_of([3, 1])
    outputs = run(denoising_model(variant), targets)
    losses = build_criterion(LossConfig())(outputs, targets)
    group = group_of(outputs, "_dn")
    assert group.logits.shape == (3, 2, 12, CLASSES)  # two groups, two kinds, three boxes
    coefficients, total = Coefficients(), losses["loss"].new_zeros(())
    for layer, suffix in enumerate(("_0", "_1", "")):
        ce = l1 = overlap = total.new_zeros(())
        for image, target in enumerate(targets):
            count = len(target["labels"])
            pairs = {start + t: t for start in (0, 6) for t in range(count)}
            for q, k in itertools.product(range(12), range(CLASSES)):
                positive = q in pairs and int(target["labels"][pairs[q]]) == k
                logit = group.logits[layer, image, q, k]
                ce = ce + focal(logit, positive, coefficients.alpha)
            for q, t in pairs.items():
                box = group.boxes[layer, image, q]
                l1 = l1 + (box - target["boxes"][t]).abs().sum()
                overlap = overlap + 1 - giou(box, target["boxes"][t])
        parts = zip(
            ("loss_ce", "loss_bbox", "loss_giou"), (ce, l1, overlap), coefficients.loss, strict=True
        )
        for name, value, weight in parts:
            found = losses[f"{name}_dn{suffix}"]
            torch.testing.assert_close(found, value / (4 * 2), rtol=1e-9, atol=1e-12)
            total = total + weight * found
    others = DetectorOutput(groups=[g for g in outputs["groups"] if g.name != "_dn"])
    plain = build_criterion(LossConfig())(others, targets)
    torch.testing.assert_close(losses["loss"], plain["loss"] + total)


def test_without_noise_and_moves_boxes_are_right() -> None:
    options = Options(num_denoising=4, dn_label_noise=0, dn_box_noise=0)
    model = denoising_model("two_stage", options)
    for head in model.bbox_embed:
        for parameter in head.get_submodule("layers.2").parameters():
            torch.nn.init.zeros_(parameter)
    targets = targets_of([2, 1])
    losses = build_criterion(LossConfig())(run(model, targets), targets)
    for name, suffix in itertools.product(("loss_bbox_dn", "loss_giou_dn"), ("_0", "_1", "")):
        assert 0 <= losses[name + suffix] < 1e-9
    assert losses["loss_bbox"] > 0.1


def test_beside_the_position_supervised_loss_theirs_is_focal_with_coefficient_1() -> None:
    targets = targets_of([3, 1])
    outputs = run(denoising_model("two_stage"), targets)
    criterion = build_criterion(LossConfig(cls_loss="position_supervised"))
    found, plain = criterion(outputs, targets), build_criterion(LossConfig())(outputs, targets)
    for suffix in ("_0", "_1", ""):
        weight = criterion.weight(f"loss_ce_dn{suffix}")
        assert weight is not None
        torch.testing.assert_close(
            weight * found[f"loss_ce_dn{suffix}"], plain[f"loss_ce_dn{suffix}"]
        )
        assert not torch.isclose(found[f"loss_ce{suffix}"], plain[f"loss_ce{suffix}"])


@pytest.mark.parametrize("cls_loss", ["vfl", "mal", "ia_bce", "giou_focal"])
def test_other_class_losses_hold_for_it_too(cls_loss: Any) -> None:
    targets = targets_of([2, 0])
    outputs = run(denoising_model("refine"), targets)
    losses = build_criterion(LossConfig(cls_loss=cls_loss))(outputs, targets)
    assert losses["loss_ce_dn"] > 0
    assert losses["loss"].isfinite()


@pytest.mark.long
@pytest.mark.parametrize("counts", [[3, 2], [0, 0], [0, 9]])
@variants
def test_every_parameter_learns(variant: str, counts: list[int]) -> None:
    model = denoising_model(variant)
    targets = targets_of(counts)
    losses = build_criterion(LossConfig())(run(model, targets), targets)
    names = {name for name in losses if "_dn" in name}
    assert len(names) == 9
    torch.autograd.backward(losses["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.long
@pytest.mark.parametrize(
    "other", [{"hybrid": HybridOptions(num_queries_one2many=9)}, {"mds": MDSOptions()}]
)
@variants
def test_it_composes_with_one_to_many_schemes(variant: str, other: dict[str, Any]) -> None:
    model, targets = denoising_model(variant, **other), targets_of([2, 1])
    alone = copy.deepcopy(model)
    del alone.recipes["denoising"]
    outputs, plain = run(model, targets), run(alone, targets)
    names = [group.name for group in outputs["groups"] if group.name != "_dn"]
    assert names == [group.name for group in plain["groups"]]
    for name in names:
        torch.testing.assert_close(group_of(outputs, name).logits, group_of(plain, name).logits)
    torch.autograd.backward(build_criterion(LossConfig())(outputs, targets)["loss"])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_nothing_of_it_is_left_in_evaluation() -> None:
    model, targets = denoising_model("plain").eval(), targets_of([1, 1])
    assert [group.name for group in run(model, targets)["groups"]] == [""]
    outputs = model.train()(pad_images(random_images(*SIZES)))
    assert [group.name for group in outputs["groups"]] == [""]


@variants
def test_keys_are_those_of_the_plain_model_and_its_own(variant: str) -> None:
    torch.manual_seed(0)
    plain = build_model(small_config(**VARIANTS[variant]), num_classes=CLASSES).state_dict()
    torch.manual_seed(0)
    recipes = {"denoising": OPTIONS}
    model = build_model(small_config(**VARIANTS[variant]), num_classes=CLASSES, recipes=recipes)
    state = model.state_dict()
    own: dict[str, tuple[int, ...]] = {"label_enc.weight": (CLASSES + 1, 64)}
    if variant != "two_stage":
        own |= {"pos_trans.weight": (64, 128), "pos_trans.bias": (64,),
                "pos_trans_norm.weight": (64,), "pos_trans_norm.bias": (64,)}  # fmt: skip
    assert {k: tuple(v.shape) for k, v in state.items() if k not in plain} == {
        f"recipes.denoising.{name}": shape for name, shape in own.items()
    }
    assert all(state[name].equal(value) for name, value in plain.items())


def test_embedded_labels_follow_the_names_of_classes() -> None:
    source, target = denoising_model("two_stage"), denoising_model("two_stage")
    perturb(source)
    key = "recipes.denoising.label_enc.weight"
    theirs, before = source.state_dict()[key], target.state_dict()[key].clone()
    theirs[-1] = 7
    report = transfer(
        target,
        source.state_dict(),
        source_classes=Classes(tuple(range(5)), tuple("abcde")),
        target_classes=Classes(tuple(range(5)), tuple("caxby")),
    )
    assert key in report.by_name
    found = target.state_dict()[key]
    assert found[[0, 1, 3]].equal(theirs[[2, 0, 1]])
    assert found[[2, 4, 5]].equal(before[[2, 4, 5]])


def step(model: DeformableDETR) -> dict[str, Tensor]:
    """Return the gradients of a step."""
    model.zero_grad()
    torch.manual_seed(2)
    targets = targets_of([3, 1])
    torch.autograd.backward(build_criterion(LossConfig())(run(model, targets), targets)["loss"])
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.long
@variants
def test_activation_checkpointing_changes_no_bit(variant: str) -> None:
    expected, model = (
        step(denoising_model(variant, dropout=0.3)),
        denoising_model(variant, dropout=0.3),
    )
    set_checkpointing(model, ("encoder", "decoder"))
    for name, value in step(model).items():
        assert value.equal(expected[name]), name


@variants
def test_in_bfloat16_places_and_scores_stay_exact(variant: str) -> None:
    torch.manual_seed(0)
    config = small_config(dropout=0.0, **VARIANTS[variant])
    model = build_model(config, num_classes=CLASSES, recipes={"denoising": OPTIONS}).train()
    targets = [{**t, "boxes": t["boxes"].float()} for t in targets_of([3, 1])]
    batch = pad_images([image.float() for image in random_images(*SIZES)])
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(batch, targets)
        group = group_of(outputs, "_dn")
        assert group.logits.dtype == group.boxes.dtype == torch.float32
        torch.autograd.backward(build_criterion(LossConfig())(outputs, targets)["loss"])
        own = [p.grad for p in model.recipes.parameters() if p.grad is not None]
        assert {gradient.dtype for gradient in own} == {torch.float32}
        found.append((group.boxes, group.logits, *own))
    assert len(found[0]) == (3 if variant == "two_stage" else 7)
    for wanted, value in zip(*found, strict=True):
        assert (value - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize(("most", "slots"), [(0, 14), (3, 14), (7, 14), (8, 28), (15, 56)])
def test_with_fixed_sizes_spare_slots_fill_few(most: int, slots: int) -> None:
    targets = targets_of([most, most // 2])
    exact, fixed = (noised(OPTIONS, targets, fixed_sizes=f) for f in (False, True))
    assert exact.learning.size == fixed.learning.size == exact.labels.shape[1]
    assert fixed.labels.shape == (2, slots)
    size = exact.labels.shape[1]
    assert fixed.labels[:, :size].equal(exact.labels)
    assert fixed.boxes[:, :size].equal(exact.boxes)
    assert fixed.labels[:, size:].eq(CLASSES).all()
    assert fixed.blocked[:size, :size].equal(exact.blocked)
    assert fixed.blocked[:size, size:].all()
    assert fixed.blocked[size:, :size].all()
    assert not fixed.blocked[size:, size:].any()


def test_options_are_checked() -> None:
    assert Options() == Options(
        num_denoising=100, dn_label_noise=0.5, dn_box_noise=1.0, dn_contrast=True
    )
    assert not Options(num_denoising=0).active
    wrong: list[dict[str, Any]] = [
        {"num_denoising": -1}, {"dn_label_noise": 1.5}, {"dn_box_noise": -0.1},
    ]  # fmt: skip
    for values in wrong:
        with pytest.raises(ConfigError, match=next(iter(values))):
            Options(**values)
