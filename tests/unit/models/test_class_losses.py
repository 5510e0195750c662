"""Classification losses against worked numbers, loops over their formulas, and `transformers`."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LwDetrConfig, RTDetrConfig
from transformers.loss.loss_lw_detr import LwDetrImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from configs.schema import LossConfig
from models.build import build_criterion
from models.criterion import Assigned, assign
from models.losses import CLASS_LOSSES
from models.matcher import HungarianMatcher, Matches, PaddedTargets, pad_targets
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput
from tests.unit.models.definitions import Target, giou, random_targets

CPU = torch.device("cpu")
CLASSES = 5
NAMES = ["focal", "vfl", "mal", "ia_bce", "position_supervised", "giou_focal"]


def one_query(other: float = -1.0) -> tuple[Tensor, Assigned]:
    """Return two logits of a query of class 0 whose box has an IoU of 0.6, and the assignment."""
    logits = torch.tensor([0.4, other], dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.24], dtype=torch.float64)
    target = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    padded = PaddedTargets(zero, target, [1])
    matches = Matches(zero[0], zero, zero)
    given = (logits[None, None, None], boxes[None, None, None], padded, matches)
    return logits, assign("", *given, focal_alpha=0.25)


@pytest.mark.parametrize(
    ("name", "entries", "value", "gradients"),
    [
        ("focal", (0.020655, 0.016994), 0.037649, (-0.040890, 0.039436)),
        ("vfl", (0.403809, 0.016994), 0.420803, (-0.000787, 0.014589)),
        ("mal", (0.727112, 0.043691), 0.770803, (0.133930, 0.037510)),
        ("ia_bce", (0.673147, 0.022658), 0.695805, (-0.000984, 0.052581)),
        ("giou_focal", (0.006008, 0.016994), 0.023002, (-0.016381, 0.039436)),
    ],
)
def test_a_query_of_iou_06_has_the_worked_value(
    name: str, entries: tuple[float, float], value: float, gradients: tuple[float, float]
) -> None:
    logits, assigned = one_query()
    (loss,) = CLASS_LOSSES[name].function(assigned)
    assert loss.item() == pytest.approx(value, abs=1e-6)
    (found,) = torch.autograd.grad(loss, logits)
    assert found.tolist() == pytest.approx(gradients, abs=1e-6)
    (positive,) = CLASS_LOSSES[name].function(one_query(other=-40.0)[1])
    assert (positive.item(), (loss - positive).item()) == pytest.approx(entries, abs=1.5e-6)


@pytest.mark.parametrize(
    ("other", "value", "gradient"), [(-1.0, 0.027947, 0.039436), (-40.0, 0.010953, 0.0)]
)
def test_a_score_learns_iou_squared_beside_a_perfect_box_of_its_image(
    other: float, value: float, gradient: float
) -> None:
    logits = torch.tensor([[0.4, other], [30.0, -30.0]], dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([0.5, 0.5, 0.4, 0.4], dtype=torch.float64)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.24], [0.5, 0.5, 0.4, 0.4]], dtype=torch.float64)
    padded = PaddedTargets(torch.zeros(1, 2, dtype=torch.int64), wanted.expand(1, 2, 4), [2])
    pairs = torch.arange(2)[None]
    matches = Matches(torch.zeros(2, dtype=torch.int64), pairs, pairs)
    assigned = assign("", logits[None, None], boxes[None, None], padded, matches, focal_alpha=0.25)
    (loss,) = CLASS_LOSSES["position_supervised"].function(assigned)
    assert loss.item() == pytest.approx(value, abs=1e-6)  # the other query is as it should be
    (found,) = torch.autograd.grad(loss, logits)
    assert found[0].tolist() == pytest.approx((0.025450, gradient), abs=1e-6)


def assignment(counts: list[int], *, seed: int = 0) -> tuple[Assigned, list[Target]]:
    """Return random predictions of two layers, each object beside a box that overlaps it."""
    torch.manual_seed(seed)
    targets = random_targets(counts, CLASSES)
    padded = pad_targets(targets, CPU)
    logits = torch.randn(2, len(counts), 8, CLASSES, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(2, len(counts), 8, 4, dtype=torch.float64) * 0.3 + 0.3
    for image, target in enumerate(targets):
        near = target["boxes"] * (1 + 0.2 * torch.randn_like(target["boxes"]))
        boxes[:, image, : len(near)] = near.clamp(0.05, 0.95)
    (matches,) = HungarianMatcher()([(logits, boxes, padded)])
    return assign("", logits, boxes, padded, matches, focal_alpha=0.25), targets


def written_out(name: str, assigned: Assigned, layer: int) -> Tensor:
    """Return the sum of a loss over one layer, entry by entry."""
    matches, total = assigned.matches, []
    quality: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
    for pair, (image, query) in enumerate(zip(matches.image, matches.query[layer], strict=True)):
        mine = assigned.matched_boxes[layer, pair].detach()
        theirs = assigned.target_boxes[layer, pair]
        place = (int(image), int(query), int(assigned.labels[layer, pair]))
        quality[place] = iou(mine, theirs), giou(mine, theirs)
    best: dict[int, float] = {}
    for (image, _, _), (u, _) in quality.items():
        best[image] = max(best.get(image, 0.0), float(u) ** 2)
    _, n, q, classes = assigned.logits.shape
    for place in ((i, j, k) for i in range(n) for j in range(q) for k in range(classes)):
        z = assigned.logits[layer][place]
        total.append(entry(name, z, quality.get(place), best.get(place[0], 0.0)))
    return torch.stack(total).sum()


def entry(name: str, z: Tensor, quality: tuple[Tensor, Tensor] | None, best: float) -> Tensor:
    """Return the loss of one logit; `quality` is IoU and GIoU where it is a pair's."""
    p = z.sigmoid()
    if quality is None:
        weight = {
            "vfl": 0.75 * p.detach() ** 2, "mal": p.detach() ** 1.5, "ia_bce": p**2,
        }.get(name, 0.75 * p**2)  # fmt: skip
        return weight * -F.logsigmoid(-z)
    u, g = quality
    target = {
        "focal": torch.ones_like(u), "vfl": u, "mal": u**1.5,
        "ia_bce": (p.detach() ** 0.25 * u**0.75).clamp(min=0.01),
        "position_supervised": u**2 / best if best else u * 0, "giou_focal": (g + 1) / 2,
    }[name]  # fmt: skip
    entropy = -target * F.logsigmoid(z) - (1 - target) * F.logsigmoid(-z)
    weight = {"vfl": u, "mal": torch.ones_like(u), "ia_bce": torch.ones_like(u)}.get(
        name, 0.25 * (target - p) ** 2
    )
    return weight * entropy


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of two cxcywh boxes."""
    low = torch.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2)
    high = torch.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    inter = (high - low).clamp(min=0).prod()
    return inter / (a[2:].prod() + b[2:].prod() - inter)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("counts", [[3, 1, 0], [0, 0]])
def test_losses_and_gradients_follow_the_formulas(name: str, counts: list[int]) -> None:
    assigned, _ = assignment(counts)
    found = CLASS_LOSSES[name].function(assigned)
    for layer in range(2):
        expected = written_out(name, assigned, layer)
        torch.testing.assert_close(found[layer], expected)
        ours, theirs = (
            torch.autograd.grad(value, assigned.logits, retain_graph=True)[0]
            for value in (found[layer], expected)
        )
        torch.testing.assert_close(ours, theirs)


def library_value(name: str, outputs: dict[str, Tensor], targets: Any, indices: Any) -> Tensor:
    """Return a loss, divided by 1, as `transformers` computes it."""
    classes: dict[str, Any] = {"vfl": RTDetrLoss, "ia_bce": LwDetrImageLoss}
    configs: dict[str, Any] = {"vfl": RTDetrConfig}
    if name == "mal":  # not in its oldest versions
        classes["mal"] = pytest.importorskip("transformers.loss.loss_deimv2").Deimv2Loss
        configs["mal"] = pytest.importorskip("transformers.models.deimv2").Deimv2Config
    if name == "ia_bce":
        loss = classes[name](None, CLASSES, 0.25, ["labels"], LwDetrConfig().group_detr)
        value: Tensor = loss.loss_labels(outputs, targets, indices, 1)["loss_ce"]
        return value
    loss = classes[name](configs[name](num_labels=CLASSES))
    loss.num_classes = CLASSES
    if name == "mal":  # DEIM's own numbers, not those of a larger model's configuration
        loss.gamma, loss.mal_alpha = 1.5, None
    value = getattr(loss, f"loss_labels_{name}")(outputs, targets, indices, 1)[f"loss_{name}"]
    return value


@pytest.mark.parametrize("name", ["vfl", "mal", "ia_bce"])
def test_losses_equal_those_of_transformers(name: str) -> None:
    assigned, targets = assignment([3, 1, 4], seed=1)
    found = CLASS_LOSSES[name].function(assigned)
    matches = assigned.matches
    theirs = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    for layer in range(2):
        indices = [
            (matches.query[layer, matches.image == i], matches.target[layer, matches.image == i])
            for i in range(len(targets))
        ]
        outputs = {"logits": assigned.logits[layer], "pred_boxes": assigned.boxes[layer]}
        expected = library_value(name, outputs, theirs, indices)
        torch.testing.assert_close(found[layer], expected, rtol=1e-6, atol=1e-6)


def test_each_loss_has_its_coefficient_unless_one_is_given() -> None:
    expected = {"focal": 2, "vfl": 1, "mal": 1, "ia_bce": 1, "position_supervised": 6}
    for name, coefficient in {**expected, "giou_focal": 2}.items():
        config: dict[str, Any] = {"cls_loss": name}
        assert build_criterion(LossConfig(**config)).weights["loss_ce"] == coefficient
        assert build_criterion(LossConfig(**config, cls_loss_coef=3)).weights["loss_ce"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch_add_up_to_it(name: str) -> None:
    targets = random_targets([0, 3, 1], CLASSES)
    criterion = build_criterion(LossConfig(cls_loss=name))  # type: ignore[arg-type]
    logits = torch.randn(2, 3, 6, CLASSES, dtype=torch.float64)
    boxes = torch.rand(2, 3, 6, 4, dtype=torch.float64) * 0.5 + 0.2

    def loss(part: slice) -> Tensor:
        groups = [GroupOutput("", logits[:, part], boxes[:, part], learning=ONE_TO_ONE)]
        return criterion(DetectorOutput(groups=groups), targets[part], 4.0)["loss"]

    whole = loss(slice(None))
    torch.testing.assert_close(loss(slice(1)) + loss(slice(1, None)), whole)


def test_an_encoder_keeps_the_plain_loss_where_the_score_says_giou() -> None:
    assigned, _ = assignment([2, 1])
    encoder = Assigned(**{**vars(assigned), "name": "_enc"})
    focal, giou_focal = (CLASS_LOSSES[name].function for name in ("focal", "giou_focal"))
    assert torch.equal(giou_focal(encoder), focal(encoder))
    assert not torch.equal(giou_focal(assigned), focal(assigned))


MatchCost = Literal["focal", "position_modulated"]
COSTS: dict[MatchCost, Callable[[float, float, float, float], float]] = {
    "position_modulated": lambda p, l1, g, best: (
        focal_cost(p * math.sqrt((g + 1) / 2 / best)) + 5 * l1 - 2 * g
    ),
    "focal": lambda p, l1, g, best: focal_cost(p) + 5 * l1 - 2 * g,
}


def focal_cost(p: float) -> float:
    """Return the class cost of a probability, times 2."""
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    return 2 * (positive - 0.75 * p**2 * -math.log(1 - p + 1e-8))


@pytest.mark.parametrize("name", COSTS)
def test_costs_follow_their_formulas(name: MatchCost) -> None:
    torch.manual_seed(0)
    targets = random_targets([2, 0, 1], CLASSES)
    logits = torch.randn(1, 3, 4, CLASSES, dtype=torch.float64)
    boxes = torch.rand(1, 3, 4, 4, dtype=torch.float64) * 0.5 + 0.2
    matcher = build_criterion(LossConfig(match_cost=name)).matcher
    cost = matcher.cost(logits, boxes, pad_targets(targets, CPU))
    for image, target in enumerate(targets):
        overlaps = {
            (q, t): float(giou(boxes[0, image, q], box))
            for q in range(4)
            for t, box in enumerate(target["boxes"])
        }
        best = max([(g + 1) / 2 for g in overlaps.values()], default=1.0)
        for (q, t), g in overlaps.items():
            p = float(logits[0, image, q, target["labels"][t]].sigmoid())
            l1 = float((boxes[0, image, q] - target["boxes"][t]).abs().sum())
            expected = COSTS[name](p, l1, g, best)
            assert float(cost[0, image, q, t]) == pytest.approx(expected, abs=1e-9)


def test_late_in_training_the_high_order_cost_is_score_times_iou4() -> None:
    """Queries beside the object differ by the usual cost alone, however little it counts."""
    target = {
        "labels": torch.tensor([0]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]], dtype=torch.float64),
    }
    sides = [
        [0.5, 0.5, 0.4, 0.32],
        [0.5, 0.5, 0.4, 0.36],
        [0.1, 0.1, 0.1, 0.1],
        [0.2, 0.2, 0.1, 0.1],
    ]
    boxes = torch.tensor(sides, dtype=torch.float64)
    logits = torch.full((1, 1, 4, 1), 40.0, dtype=torch.float64)
    padded = pad_targets([target], CPU)
    matcher = build_criterion(LossConfig(match_cost="high_order")).matcher
    plain = HungarianMatcher()
    given = (logits, boxes[None, None], padded)
    matcher.progress = 0.7499
    assert torch.equal(matcher.cost(*given), plain.cost(*given))
    matcher.progress = 0.75
    found = matcher.cost(*given) - 1e-6 * plain.cost(*given)
    assert found.flatten().tolist() == pytest.approx([-0.4096, -0.6561, 0, 0], abs=1e-9)
    assert matcher.cost(*given)[0, 0, 3, 0] < matcher.cost(*given)[0, 0, 2, 0]
