"""Several queries for an object, ranked: against loops over the published formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from configs.schema import LossConfig
from models.build import build_criterion
from models.matcher import pad_targets
from models.prime_samples import PrimeSampleCriterion, ranks_within
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput
from tests.unit.models.definitions import Target, corners, giou, random_targets
from util.errors import ConfigError

CLASSES, QUERIES = 4, 12
TAU = 1.5


def iou(a: Tensor, b: Tensor) -> float:
    """Return the IoU of two cxcywh boxes."""
    ax0, ay0, ax1, ay1 = map(float, corners(a))
    bx0, by0, bx1, by1 = map(float, corners(b))
    width, height = min(ax1, bx1) - max(ax0, bx0), min(ay1, by1) - max(ay0, by0)
    inter = max(width, 0.0) * max(height, 0.0)
    return inter / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter)


def cost_of(
    logits: Tensor, boxes: Tensor, target: Target
) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    cost = np.zeros((len(logits), len(target["labels"])))
    for q in range(cost.shape[0]):
        for t in range(cost.shape[1]):
            p = float(logits[q, target["labels"][t]].sigmoid())
            gain = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
            loss = 0.75 * p**2 * -math.log(1 - p + 1e-8)
            distance = float((boxes[q] - target["boxes"][t]).abs().sum())
            cost[q, t] = (
                2 * (gain - loss) + 5 * distance - 2 * float(giou(boxes[q], target["boxes"][t]))
            )
    return cost


def layer_loss(logits: Tensor, boxes: Tensor, targets: list[Target], samples: int) -> list[Tensor]:
    """Return the sums of class, L1 and GIoU losses of one layer, as Align-DETR's code has them."""
    ce, l1, overlap = (logits.new_zeros(()) for _ in range(3))
    for image, target in enumerate(targets):
        count = len(target["labels"])
        copies = max(1, min(samples, QUERIES // (2 * count))) if count else 1
        cost = np.tile(cost_of(logits[image].detach(), boxes[image].detach(), target), (1, copies))
        pairs = [(q, t % max(count, 1)) for q, t in zip(*linear_sum_assignment(cost), strict=True)]
        soft: dict[tuple[int, int], Tensor] = {}
        for wanted in range(count):
            found = []
            for q in [q for q, t in pairs if t == wanted]:
                p = logits[image, q, target["labels"][wanted]].detach().sigmoid()
                u = iou(boxes[image, q].detach(), target["boxes"][wanted])
                found.append(((p**0.25 * u**0.75).clamp(min=0.01), q))
            found.sort(key=lambda pair: -float(pair[0]))
            assert len(found) == copies
            for rank, (t, q) in enumerate(found):
                weight = math.exp(-rank / TAU)
                soft[q, int(target["labels"][wanted])] = t * weight
                box = boxes[image, q]
                l1 = l1 + weight * (box - target["boxes"][wanted]).abs().sum()
                overlap = overlap + weight * (1 - giou(box, target["boxes"][wanted]))
        for q in range(QUERIES):
            for k in range(CLASSES):
                z = logits[image, q, k]
                if (q, k) in soft:
                    t = soft[q, k]
                    ce = ce - t * F.logsigmoid(z) - (1 - t) * F.logsigmoid(-z)
                else:
                    ce = ce - z.sigmoid() ** 2 * F.logsigmoid(-z)
    return [ce, l1, overlap]


def predictions(layers: int, images: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(layers, images, QUERIES, CLASSES, dtype=torch.float64)
    boxes = torch.rand(layers, images, QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2
    return logits.requires_grad_(), boxes.requires_grad_()


def outputs(group: tuple[Tensor, Tensor], encoder: tuple[Tensor, Tensor]) -> DetectorOutput:
    return DetectorOutput(
        groups=[
            GroupOutput("", *group, learning=ONE_TO_ONE),
            GroupOutput("_enc", *encoder, learning=ONE_TO_ONE),
        ]
    )


def criterion() -> PrimeSampleCriterion:
    found = build_criterion(LossConfig(cls_loss="ia_bce", prime_samples=2))
    assert isinstance(found, PrimeSampleCriterion)
    return found


@pytest.mark.parametrize("counts", [[2, 0, 4], [5, 7], [0, 0]])
def test_losses_and_gradients_follow_the_published_formulas(counts: list[int]) -> None:
    torch.manual_seed(0)
    targets = random_targets(counts, CLASSES)
    decoder, encoder = predictions(3, len(counts)), predictions(1, len(counts))
    losses = criterion()(outputs(decoder, encoder), targets)
    named = {f"_{i}": (layer, 2) for i, layer in enumerate(zip(*decoder, strict=True))}
    named[""] = (named.pop("_2")[0], 1)  # the last layer finds each object once
    named["_enc"] = ((encoder[0][0], encoder[1][0]), 2)
    inputs = [*decoder, *encoder]
    total, divisor = 0 * torch.stack([t.sum() for t in inputs]).sum(), max(sum(counts), 1)
    for suffix, (layer, samples) in named.items():
        expected = layer_loss(*layer, targets, samples)
        for name, value, factor in zip(
            ("loss_ce", "loss_bbox", "loss_giou"), expected, (1, 5, 2), strict=True
        ):
            torch.testing.assert_close(losses[f"{name}{suffix}"], value / divisor)
            total = total + factor * value / divisor
    torch.testing.assert_close(losses["loss"], total)
    for ours, theirs in zip(
        torch.autograd.grad(losses["loss"], inputs), torch.autograd.grad(total, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_parts_of_a_batch_add_up_to_it() -> None:
    torch.manual_seed(1)
    targets = random_targets([1, 7, 0, 3], CLASSES)
    decoder, encoder = predictions(2, 4), predictions(1, 4)

    def losses(part: slice) -> dict[str, Tensor]:
        chosen = [tuple(t[:, part] for t in group) for group in (decoder, encoder)]
        return criterion()(outputs(*chosen), targets[part], 11.0)  # type: ignore[arg-type]

    whole, first, second = (losses(part) for part in (slice(None), slice(1), slice(1, None)))
    for name, value in whole.items():
        torch.testing.assert_close(first[name] + second[name], value, msg=name)


def test_without_earlier_layers_each_object_has_one_query() -> None:
    torch.manual_seed(2)
    targets = random_targets([3, 1], CLASSES)
    alone = DetectorOutput(groups=[GroupOutput("", *predictions(1, 2), learning=ONE_TO_ONE)])
    expected = build_criterion(LossConfig(cls_loss="ia_bce"))(alone, targets)
    assert torch.equal(criterion()(alone, targets)["loss"], expected["loss"])


def test_pairs_of_the_last_layer_are_the_cheapest() -> None:
    torch.manual_seed(3)
    targets = pad_targets(random_targets([2, 0, 4], CLASSES), torch.device("cpu"))
    logits, boxes = (t.detach() for t in predictions(2, 3))
    matches = criterion().pairs(logits, boxes, targets, last_alone=True)
    assert matches.real is not None
    (plain,) = criterion().matcher([(logits[1:], boxes[1:], targets)])
    real = matches.real[1]
    assert torch.equal(matches.image[real], plain.image)
    assert torch.equal(matches.query[1, real], plain.query[0])
    assert torch.equal(matches.target[1, real], plain.target[0])
    assert matches.real[0].all()


def test_ranks_are_within_each_object() -> None:
    values = torch.tensor([[0.3, 0.6, 0.5, 0.9, 0.6, 0.1]])
    objects = torch.tensor([[7, 7, 7, 2, 7, 2]])
    assert ranks_within(values, objects).tolist() == [[3, 0, 2, 0, 1, 1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"cls_loss": "vfl"}, "ia_bce"), ({"cls_loss": "ia_bce", "union_set": True}, "union_set")],
)
def test_what_does_not_compose_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=f"prime_samples: .*{words}"):
        LossConfig(prime_samples=2, **options)  # type: ignore[arg-type]
