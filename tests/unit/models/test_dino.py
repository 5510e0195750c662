"""The parts of DINO's model: positions from boxes, normed heads, shared heads, classes proposed."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from models.build import build_model
from models.decoder import DeformableDecoderLayer
from models.deformable_detr import DeformableDETR
from models.dino_decoder import DinoDecoder
from models.heads import MLP
from models.levels import PositionEmbeddingSine
from models.proposals import Proposals
from tests.unit.models.small import group_of, random_images, small_config, small_model
from util.batch import pad_images
from util.errors import ConfigError

TWO_STAGE: dict[str, Any] = {
    "with_box_refine": True, "two_stage": True, "mixed_query_selection": True, "dropout": 0.0,
}  # fmt: skip
DINO: dict[str, Any] = {
    **TWO_STAGE, "look_forward_twice": True, "query_position": "box", "decoder_norm": True,
    "class_proposals": True, "refine_eps": 1e-3,
}  # fmt: skip


def perceptron(mlp: MLP, x: Tensor) -> Tensor:
    """Return what linear layers with ReLU between them make of x."""
    for index, layer in enumerate(mlp.layers):
        assert isinstance(layer, nn.Linear)
        x = F.linear(x if index == 0 else x.relu(), layer.weight, layer.bias)
    return x


def sines(box: Tensor, width: int) -> list[float]:
    """Return the embedding of one box: y, x, w, h, half of the width each."""
    half = width // 2
    values = []
    for number in (box[1], box[0], box[2], box[3]):
        for i in range(half):
            angle = float(number) * 2 * math.pi / 10000 ** (2 * (i // 2) / half)
            values.append(math.cos(angle) if i % 2 else math.sin(angle))
    return values


def logit(x: Tensor, eps: float) -> Tensor:
    return x.clamp(min=eps).log() - (1 - x).clamp(min=eps).log()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_decoder_follows_its_definition(scaled: bool) -> None:
    torch.manual_seed(3)
    options = DINO | {"query_position": "scaled_box" if scaled else "box"}
    model = small_model(**options)
    decoder, seen = model.transformer.decoder, []
    decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.requires_grad_(False)
    output = group_of(model(pad_images(random_images((60, 90), (75, 64)))))
    groups, memory, levels = seen[0]
    (group,) = groups
    assert isinstance(decoder, DinoDecoder)
    assert decoder.ref_point_head is not None
    assert decoder.norm is not None
    ratios = torch.cat([levels.valid_ratios, levels.valid_ratios], dim=-1)  # [N,L,4]
    assert float(ratios.min()) < 1.0
    x, given, refined = group.content, group.reference, group.reference
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DeformableDecoderLayer)
        places = given[:, :, None] * ratios[:, None]  # [N,Q,L,4]
        embedded = torch.tensor(
            [[sines(box, 64) for box in image] for image in places[:, :, 0]], dtype=x.dtype
        )
        position = perceptron(decoder.ref_point_head, embedded)
        if scaled and index > 0:
            assert decoder.query_scale is not None
            position = position * perceptron(decoder.query_scale, x)
        x, _ = layer(x, position, places, memory, levels)
        read = F.layer_norm(x, (64,), decoder.norm.weight, decoder.norm.bias)
        classes = decoder.heads.class_embed[index]
        boxes = decoder.heads.bbox_embed[index]
        assert isinstance(boxes, MLP)
        assert isinstance(classes, nn.Linear)
        expected = (perceptron(boxes, read) + logit(refined, 1e-3)).sigmoid()
        torch.testing.assert_close(output.boxes[index], expected, rtol=0, atol=1e-9)
        scores = F.linear(read, classes.weight, classes.bias)
        torch.testing.assert_close(output.logits[index], scores, rtol=0, atol=1e-9)
        given = refined = (perceptron(boxes, x) + logit(given, 1e-3)).sigmoid()


def test_a_reference_near_the_edge_is_clamped_where_asked() -> None:
    for eps in (1e-5, 1e-3):
        model = build_model(small_config(**TWO_STAGE, refine_eps=eps), num_classes=3)
        assert model.transformer.decoder.refine_eps == eps


def test_positions_have_the_temperature_and_the_offset_asked_for() -> None:
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    encoding = PositionEmbeddingSine(4, temperature=20.0, offset=0.0)(mask, torch.float64)
    for row in range(2):
        for column in range(3):
            expected = []
            for place, extent in ((row + 1, 2), (column + 1, 3)):
                for i in range(4):
                    angle = place / (extent + 1e-6) * 2 * math.pi / 20 ** (2 * (i // 2) / 4)
                    expected.append(math.cos(angle) if i % 2 else math.sin(angle))
            got = encoding[0, :, row, column]
            torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.long
def test_layers_share_heads_and_the_encoder_has_its_own() -> None:
    torch.manual_seed(0)
    shared = build_model(small_config(**TWO_STAGE, shared_heads=True), num_classes=3)
    torch.manual_seed(0)
    apart = build_model(small_config(**TWO_STAGE), num_classes=3)
    assert shared.state_dict().keys() == apart.state_dict().keys()
    for heads, others in (
        (shared.class_embed, apart.class_embed), (shared.bbox_embed, apart.bbox_embed),
    ):  # fmt: skip
        assert heads[0] is heads[1] is heads[2]
        assert heads[3] is not heads[0]
        assert others[0] is not others[1]
    for key, tensor in apart.state_dict().items():  # the same first weights
        assert tensor.equal(shared.state_dict()[key]), key


def proposals(**options: Any) -> Proposals:
    torch.manual_seed(0)
    logits, padding = torch.randn(2, 9, 4), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, :3] = True
    boxes, anchors, memory = torch.randn(2, 9, 4), torch.rand(2, 9, 4), torch.randn(2, 9, 8)
    return Proposals(logits, boxes, anchors, padding, memory, **options)


@pytest.mark.parametrize("num_learning", [None, 5, 20])
def test_the_best_proposals_are_those_of_an_object_or_of_any_class(
    num_learning: int | None,
) -> None:
    given = proposals(num_learning=num_learning)
    best = given.best(0, 4)
    output = given.output(on_anchors=True)
    assert output.learning.anchors is not None
    for image in range(2):
        scores = given.logits[image].tolist()
        usable = [i for i in range(9) if not given.padding_mask[image, i]]
        usable.sort(key=lambda i: -scores[i][0] if num_learning is None else -max(scores[i]))
        torch.testing.assert_close(best[image], given.box_logits[image, usable[:4]].sigmoid())
        if num_learning == 5:
            assert output.logits[0, image].equal(given.logits[image, usable[:5]])
            assert output.learning.anchors[image].equal(given.anchors[image, usable[:5]])
    assert output.logits.shape[2] == min(num_learning or 9, 9)
    assert (output.learning.targets is None) == (num_learning is not None)


def test_without_boxes_to_transform_there_is_nothing_that_transforms_them() -> None:
    keys = small_keys(DINO) - small_keys(TWO_STAGE)
    assert keys == {
        f"transformer.decoder.{name}.{part}"
        for name in ("norm", "ref_point_head.layers.0", "ref_point_head.layers.1")
        for part in ("weight", "bias")
    }
    gone = small_keys(TWO_STAGE) - small_keys(DINO)
    assert {key.rpartition(".")[0] for key in gone} == {
        "transformer.pos_trans", "transformer.pos_trans_norm"
    }  # fmt: skip


def small_keys(options: dict[str, Any]) -> set[str]:
    model: DeformableDETR = build_model(small_config(**options), num_classes=3)
    return {*model.state_dict()}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"query_position": "box", "two_stage": True, "with_box_refine": True},
         "`mixed_query_selection`"),
        ({"shared_heads": True}, "no effect without `with_box_refine`"),
        ({"class_proposals": True}, "no effect without `two_stage`"),
    ],
)  # fmt: skip
def test_options_without_what_they_need_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        ModelConfig(**options)
