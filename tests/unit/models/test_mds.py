"""MDS-DETR: who sees whom in its last layer, what learns from what, and its quality assignment."""

import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.schema import LossConfig
from models.build import build_criterion, build_model
from models.decoder import DeformableDecoderLayer
from models.deformable_detr import DeformableDETR
from models.queries import DetectorOutput
from models.recipes.mds import MDS, Options, Suppressor
from models.weights.official import published_weights
from models.weights.transfer import transfer
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, group_of, perturb, random_images, small_config
from util.batch import pad_images
from util.classes import Classes
from util.errors import CheckpointError

CLASSES = 5
SIZES = [(128, 96), (100, 128)]


def mds_model(variant: str = "two_stage") -> DeformableDETR:
    """Return a perturbed float64 detector in training mode, without dropout."""
    config = small_config(dropout=0.0, **VARIANTS[variant])
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES, recipes={"mds": Options()}).double()
    perturb(model)
    return model.train()


def run(model: DeformableDETR) -> DetectorOutput:
    """Return the outputs for two random images, the same in every call."""
    torch.manual_seed(1)
    images = pad_images(random_images(*SIZES))
    outputs: DetectorOutput = model(images, random_targets([3, 1], CLASSES))
    return outputs


def suppressor(*, zero: bool = False) -> Suppressor:
    """Return a layer of width 32 in float64, with random weights or with none but its biases."""
    torch.manual_seed(0)
    layer = Suppressor(32, 4, 48).double()
    if not zero:
        perturb(layer)
    return layer


def random_queries(queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, scores and boxes of one image."""
    torch.manual_seed(2)
    boxes = torch.rand(1, queries, 4, dtype=torch.float64) * 0.4 + 0.2
    return torch.randn(1, queries, 32).double(), torch.randn(1, queries, 3).double(), boxes


def test_at_first_a_query_looks_at_better_ones_and_at_the_tokens_alike() -> None:
    layer = suppressor(zero=True)
    scores = torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64)[None, :, None]
    boxes = torch.rand(1, 4, 4, dtype=torch.float64) * 0.4 + 0.2
    weights = layer.bias(scores, boxes).softmax(-1)
    expected = torch.tensor(
        [[0, 0, 0, 0, 1], [0.5, 0, 0, 0, 0.5], [0.25, 0.25, 0, 0.25, 0.25], [0.5, 0, 0, 0, 0.5]]
    ).double()
    for head in range(4):
        found = torch.cat([weights[0, head, :, :4], weights[0, head, :, 4:].sum(1)[:, None]], 1)
        torch.testing.assert_close(found, expected)


def written_out(layer: Suppressor, x: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
    """Return the output for one image, query by query and head by head."""
    width, head = x.shape[-1], x.shape[-1] // layer.n_heads
    rows = [
        slice(start + part * width, start + part * width + head)
        for start in range(0, width, head)
        for part in range(3)
    ]
    weight, offset = layer.in_proj.weight, layer.in_proj.bias
    best, bias = scores[0].amax(-1), layer.bias(scores, boxes)[0]
    attended = torch.zeros_like(x[0])
    for h in range(layer.n_heads):
        of_query, of_key, of_value = rows[3 * h : 3 * h + 3]
        keys = torch.cat([x[0], layer.token_key]) @ weight[of_key].T + offset[of_key]
        values = torch.cat([x[0], layer.token_value]) @ weight[of_value].T + offset[of_value]
        for i in range(x.shape[1]):
            query = weight[of_query] @ x[0, i] + offset[of_query]
            seen = [j for j in range(x.shape[1]) if best[j] > best[i]]
            seen += range(x.shape[1], len(keys))
            logits = torch.stack([query @ keys[j] / math.sqrt(head) + bias[h, i, j] for j in seen])
            attended[i, h * head : (h + 1) * head] = logits.softmax(0) @ values[seen]
    y = layer.norm1(x[0] + layer.out_proj(attended))
    output: Tensor = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    return output[None]


def test_queries_attend_to_better_ones_and_to_projected_tokens() -> None:
    layer = suppressor()
    given = random_queries(6)
    with torch.no_grad():
        torch.testing.assert_close(layer(*given), written_out(layer, *given))


def kinds(rows: Tensor) -> int:
    """Return how many rows there are of which none equals another."""
    return len({tuple(row) for row in rows.tolist()})


def test_tokens_differ_from_the_first_step_on() -> None:
    layer = suppressor(zero=True)
    assert kinds(layer.token_key) == kinds(layer.token_value) == 10
    x, scores, boxes = random_queries(6)
    torch.autograd.backward(layer(x, scores, boxes).square().sum())
    for tokens in (layer.token_key, layer.token_value):
        assert tokens.grad is not None
        assert kinds(tokens.grad) == 10


def test_it_has_the_published_number_of_parameters() -> None:
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    last = size(Suppressor(256, 8, 2048))
    layer = size(
        DeformableDecoderLayer(256, d_ffn=2048, dropout=0.0, n_levels=4, n_heads=8, n_points=4)
    )
    assert last == 1_337_816
    assert (5 * layer + last, 6 * layer) == (9_067_096, 9_275_136)


def test_the_worst_query_changes_nobody_else() -> None:
    layer = suppressor()
    x, scores, boxes = random_queries(6)
    worst = int(scores.amax(-1).argmin())
    others = [i for i in range(6) if i != worst]
    before = layer(x, scores, boxes)
    x = x.clone()
    x[:, worst] += 1
    after = layer(x, scores, boxes)
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.isclose(after[:, worst], before[:, worst]).all()


def test_the_order_of_queries_does_not_matter() -> None:
    layer = suppressor()
    given = random_queries(7)
    order = torch.randperm(7)
    expected = layer(*given)[:, order]
    torch.testing.assert_close(layer(*(t[:, order] for t in given)), expected)


def test_bias_of_boxes_is_symmetric_and_without_a_gradient() -> None:
    layer = suppressor()
    _, scores, boxes = random_queries(5)
    ranked = torch.arange(5.0, dtype=torch.float64)[None, :, None]
    low_first, high_first = (layer.bias(s, boxes)[..., :5] for s in (ranked, -ranked))
    for i, j in pairwise(range(5)):  # who sees whom is exchanged, what is added is not
        torch.testing.assert_close(low_first[0, :, i, j], high_first[0, :, j, i])
    scores.requires_grad_()
    boxes.requires_grad_()
    torch.autograd.backward(layer.bias(scores, boxes).softmax(-1).square().sum())
    assert scores.grad is None
    assert boxes.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoder_learns_one_to_many_and_the_last_layer_one_to_one(variant: str) -> None:
    model = mds_model(variant)
    outputs = run(model)
    names = ["", "_one2many"] + ["_enc"] * (variant == "two_stage")
    assert [group.name for group in outputs["groups"]] == names
    detecting, many = group_of(outputs), group_of(outputs, "_one2many")
    assert (len(detecting.logits), len(many.logits)) == (1, 3)
    assert torch.equal(detecting.boxes[-1], many.boxes[-1])
    assert torch.equal(outputs["pred_logits"], detecting.logits[-1])
    losses = build_criterion(LossConfig(cls_loss="vfl"))(outputs, random_targets([3, 1], CLASSES))
    assert {"loss_ce", "loss_ce_one2many", "loss_giou_one2many_1"} <= losses.keys()
    weighted = losses["loss_ce"] + 5 * losses["loss_bbox"] + 2 * losses["loss_giou"]
    for suffix in ("_one2many_0", "_one2many_1", "_one2many"):
        weighted = weighted + 0.5 * losses[f"loss_ce{suffix}"]
        weighted = weighted + 5 * losses[f"loss_bbox{suffix}"] + 2 * losses[f"loss_giou{suffix}"]
    if variant == "two_stage":
        assert group_of(outputs, "_enc").learning.anchors is not None
        weighted = weighted + losses["loss_ce_enc"]
        weighted = weighted + 5 * losses["loss_bbox_enc"] + 2 * losses["loss_giou_enc"]
    torch.testing.assert_close(losses["loss"], weighted)
    torch.autograd.backward(losses["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_boxes_learn_nothing_from_what_the_last_layer_suppresses() -> None:
    model = mds_model()
    outputs = run(model)
    detecting = DetectorOutput(groups=[group_of(outputs)])
    losses = build_criterion(LossConfig())(detecting, random_targets([3, 1], CLASSES))
    torch.autograd.backward(losses["loss"])
    assert all(p.grad is None for p in model.bbox_embed.parameters())
    recipe = model.recipes["mds"]
    assert isinstance(recipe, MDS)
    assert all(p.grad is not None for p in recipe.parameters())


def test_a_trained_model_keeps_its_last_layer_and_learns_as_in_training() -> None:
    model = mds_model()
    trained = run(model)
    evaluated = run(model.eval())
    torch.testing.assert_close(evaluated["pred_logits"], trained["pred_logits"])
    assert [group.name for group in evaluated["groups"]] == ["", "_enc"]


def test_queries_look_at_the_image_before_they_learn_of_each_other() -> None:
    model = mds_model()
    calls: list[str] = []
    layer = model.transformer.decoder.layers[0]
    for name in ("cross_attn", "self_attn"):
        module = layer.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    run(model.eval())
    assert calls == ["cross_attn", "self_attn"]


def test_scores_of_equal_boxes_are_finite_where_all_are_as_good() -> None:
    layer = suppressor()
    x, scores, boxes = random_queries(4)
    output = layer(x, scores * 0, boxes[:, :1].expand(-1, 4, -1))
    assert output.isfinite().all()
    assert math.isclose(float(layer.bias(scores * 0, boxes).softmax(-1)[..., 4:].sum()), 16.0)


def test_rows_of_its_class_head_follow_the_class_names() -> None:
    old, new = ("cat", "dog", "cow", "owl", "ape"), ("owl", "cat", "emu", "dog", "yak")
    source, target = mds_model(), mds_model()
    perturb(target)
    report = transfer(
        target,
        source.state_dict(),
        source_classes=Classes(tuple(range(5)), old),
        target_classes=Classes(tuple(range(5)), new),
    )
    name = "recipes.mds.class_embed.weight"
    assert name in report.by_name
    theirs, ours = source.state_dict()[name], target.state_dict()[name]
    assert torch.equal(ours[[0, 1, 3]], theirs[[3, 0, 1]])


def test_no_other_implementation_has_it(tmp_path: Path) -> None:
    options = asdict(small_config(backbone="resnet50", **VARIANTS["two_stage"]))
    with pytest.raises(CheckpointError, match="other implementations have no mds"):
        published_weights(mds_model().state_dict(), options, tmp_path / "a.pth")
