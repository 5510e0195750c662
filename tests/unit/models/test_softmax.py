"""DETR's classification against `transformers`, and what it leaves as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_for_object_detection import HungarianMatcher as TheirMatcher
from transformers.loss.loss_for_object_detection import ImageLoss

from configs.load import Given
from configs.schema import LossConfig, ModelConfig
from models.build import build_criterion, build_model
from models.match_costs import ProbabilityMatcher
from models.postprocess import PostProcess
from models.queries import ONE_TO_ONE, DetectorOutput, GroupOutput
from models.recipes import KnownRecipes
from models.softmax import SoftmaxHead, log_odds
from models.weights.official import published_weights
from models.weights.transfer import transfer
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import group_of, perturb, random_images, small_config
from util.batch import EffectiveBatch, pad_images
from util.classes import Classes
from util.errors import CheckpointError, ConfigError

CLASSES, QUERIES = 5, 9
DETR: dict[str, Any] = {"cls_loss": "softmax", "match_cost": "probability", "set_cost_class": 1.0}


def predictions(layers: int, images: int) -> tuple[Tensor, Tensor]:
    """Return raw logits, one for "no object", and boxes."""
    logits = torch.randn(layers, images, QUERIES, CLASSES + 1, dtype=torch.float64) * 2
    boxes = torch.rand(layers, images, QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2
    return logits.requires_grad_(), boxes.requires_grad_()


def outputs(raw: Tensor, boxes: Tensor) -> DetectorOutput:
    return DetectorOutput(groups=[GroupOutput("", log_odds(raw), boxes, learning=ONE_TO_ONE)])


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0]])
@pytest.mark.parametrize("eos", [0.1, 1.0])
def test_losses_and_gradients_are_those_of_transformers(counts: list[int], eos: float) -> None:
    torch.manual_seed(0)
    targets = random_targets(counts, CLASSES)
    raw, boxes = predictions(3, len(counts))
    ours = build_criterion(LossConfig(**DETR, eos_coef=eos))(outputs(raw, boxes), targets)
    matcher = TheirMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    make: Any = ImageLoss
    theirs = make(matcher, CLASSES, eos, ["labels", "boxes"]).double()
    layers = [{"logits": z, "pred_boxes": b} for z, b in zip(raw, boxes, strict=True)]
    expected = theirs(
        {**layers[-1], "auxiliary_outputs": layers[:-1]},
        [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets],
    )
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    total = torch.zeros((), dtype=torch.float64)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9, msg=name)
        total = total + value * weights["_".join(name.split("_")[:2])]
    torch.testing.assert_close(ours["loss"], total, rtol=1e-6, atol=1e-9)
    for mine, other in zip(
        torch.autograd.grad(ours["loss"], [raw, boxes]),
        torch.autograd.grad(total + 0 * boxes.sum(), [raw, boxes]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_logits_are_those_of_the_softmax_however_sure_it_is() -> None:
    raw = torch.tensor([[50.0, 1.0, -2.0], [0.3, 0.3, 0.3], [-90.0, 0.0, 90.0]])
    found = log_odds(raw.requires_grad_())
    torch.testing.assert_close(found.sigmoid(), raw.softmax(-1))
    torch.testing.assert_close(F.logsigmoid(found), raw.log_softmax(-1))
    assert found.isfinite().all()
    torch.autograd.backward(found.sum())
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    exact = raw.detach()[2] - torch.tensor([90.0, 90.0, 0.0])
    torch.testing.assert_close(found[2], exact)
    random = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_odds, random)


def test_parts_of_a_batch_add_up_to_it() -> None:
    torch.manual_seed(1)
    targets = random_targets([0, 3, 1, 0], CLASSES)
    raw, boxes = predictions(2, 4)
    whole = EffectiveBatch.of(targets)

    def losses(part: slice) -> dict[str, Tensor]:
        criterion = build_criterion(LossConfig(**DETR))
        criterion.whole = whole
        return criterion(outputs(raw[:, part], boxes[:, part]), targets[part], 4.0)

    expected, first, second = (losses(p) for p in (slice(None), slice(1), slice(1, None)))
    alone = build_criterion(LossConfig(**DETR))(outputs(raw, boxes), targets)
    for name, value in expected.items():
        torch.testing.assert_close(first[name] + second[name], value, msg=name)
        torch.testing.assert_close(alone[name], value, msg=name)


def detr() -> Any:
    """Return a perturbed float64 one-stage detector with softmax scores."""
    torch.manual_seed(0)
    model = build_model(small_config(dropout=0.0, scores="softmax"), num_classes=CLASSES).double()
    perturb(model)
    return model.train()


def test_detections_are_without_the_score_of_no_object() -> None:
    model = detr()
    output = model(pad_images(random_images((60, 90))))
    logits = group_of(output).logits[-1]
    assert logits.shape[-1] == CLASSES + 1
    assert torch.equal(output["pred_logits"], logits[..., :-1])
    torch.testing.assert_close(logits.sigmoid().sum(-1), torch.ones_like(logits[..., 0]))
    (found,) = PostProcess(max_detections=4)(output, torch.tensor([[60, 90]]))
    head = model.class_embed[-1]
    assert isinstance(head, SoftmaxHead)
    expected = logits.sigmoid()[0, :, :-1].flatten().topk(4).values
    torch.testing.assert_close(found["scores"], expected)


def test_rows_of_classes_go_by_name_and_that_of_no_object_is_kept() -> None:
    source, target = detr(), detr()
    perturb(target)
    transfer(
        target,
        source.state_dict(),
        source_classes=Classes(tuple(range(5)), ("cat", "dog", "cow", "owl", "ape")),
        target_classes=Classes(tuple(range(5)), ("owl", "cat", "emu", "dog", "yak")),
    )
    theirs, ours = source.class_embed[0], target.class_embed[0]
    assert torch.equal(ours.weight[[0, 1, 3]], theirs.weight[[3, 0, 1]])
    assert torch.equal(ours.no_object.weight, theirs.no_object.weight)


def test_one_switch_chooses_scores_and_matching() -> None:
    config = Given({"loss": {"cls_loss": "softmax"}}).config()
    assert config.model.scores == "softmax"
    assert (config.loss.match_cost, config.loss.set_cost_class) == ("probability", 1.0)
    assert isinstance(build_criterion(config.loss).matcher, ProbabilityMatcher)
    # a model that has such scores goes on with them, unless another loss is asked for
    below = Given({"model": {"scores": "softmax"}})
    assert below.config().loss.cls_loss == "softmax"
    above = Given({"loss": {"cls_loss": "focal"}}).on(below)
    assert above.config().model.scores == "sigmoid"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"two_stage": True, "with_box_refine": True}}, "two_stage"),
        ({"loss": {"union_set": True}}, "union_set"),
        ({"recipes": {"ms": {}}}, "`ms`"),
        ({"model": {"scores": "sigmoid"}}, "Leave `scores` out"),
    ],
)
def test_what_does_not_compose_is_refused(values: dict[str, Any], words: str) -> None:
    loss = {"cls_loss": "softmax", **values.get("loss", {})}
    with pytest.raises(ConfigError, match=words):
        Given({**values, "loss": loss}, KnownRecipes()).config()


def test_no_other_implementation_of_this_model_has_it(tmp_path: Path) -> None:
    options = vars(ModelConfig(scores="softmax"))
    with pytest.raises(CheckpointError, match="have no scores 'softmax'"):
        published_weights(detr().state_dict(), options, tmp_path / "a.pth")
