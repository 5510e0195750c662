"""Grounding DINO's enhancer and its scores, against Hugging Face's layer and loops."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GroundingDinoConfig
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoEncoderLayer

from models.build import build_model
from models.contrastive import ContrastiveHead
from models.encoders import ENCODERS, EncoderOptions
from models.encoders.enhancer import EnhancerEncoder, Fusion
from models.levels import FeatureLevels, cell_centres
from models.weights.transfer import transfer
from tests.unit.models.small import built, perturb, random_images, small_config, small_model
from tests.unit.models.test_encoder_attention import (
    HEADS,
    SHAPES,
    VALID,
    WIDTH,
    padded_levels,
    random_maps,
    second_image,
)
from util.batch import pad_images
from util.classes import Classes
from util.errors import ConfigError

CLASSES = 5
_PROJECTIONS = ("query", "key", "value")
# Theirs -> ours, in the one layer of an encoder.
NAMES = {
    r"fusion_layer\.layer_norm_vision": "fusions.0.image_norm",
    r"fusion_layer\.layer_norm_text": "fusions.0.token_norm",
    r"fusion_layer\.attn\.vision_proj": "fusions.0.image_key",
    r"fusion_layer\.attn\.text_proj": "fusions.0.token_key",
    r"fusion_layer\.attn\.values_vision_proj": "fusions.0.image_value",
    r"fusion_layer\.attn\.values_text_proj": "fusions.0.token_value",
    r"fusion_layer\.attn\.out_vision_proj": "fusions.0.image_out",
    r"fusion_layer\.attn\.out_text_proj": "fusions.0.token_out",
    r"fusion_layer\.vision_param": "fusions.0.image_scale",
    r"fusion_layer\.text_param": "fusions.0.token_scale",
    r"text_enhancer_layer\.self_attn\.out_proj": "token_layers.0.self_attn.out_proj",
    r"text_enhancer_layer\.fc": "token_layers.0.linear",
    r"text_enhancer_layer\.layer_norm_before": "token_layers.0.norm1",
    r"text_enhancer_layer\.layer_norm_after": "token_layers.0.norm2",
    r"deformable_layer\.self_attn_layer_norm": "layers.0.norm1",
    r"deformable_layer\.final_layer_norm": "layers.0.norm2",
    r"deformable_layer\.self_attn\.": "layers.0.self_attn.",
    r"deformable_layer\.fc": "layers.0.linear",
}


def encoder(**options: Any) -> EnhancerEncoder:
    """Return a perturbed float64 encoder of three levels."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "d_model": WIDTH, "num_layers": 2, "d_ffn": 24, "dropout": 0.0, "n_levels": 3,
        "n_heads": HEADS, "n_points": 2, "num_classes": CLASSES,
    }  # fmt: skip
    made = EnhancerEncoder(EncoderOptions(**(values | options))).double()
    made.reset_parameters()
    perturb(made)
    return made


def levels_of(seed: int = 1) -> FeatureLevels:
    """Return three random levels of two images, the second of which is padded."""
    features, pos = random_maps(seed, 2)
    return padded_levels(features, pos)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a layer of Hugging Face under the keys of an encoder of ours."""
    found = {}
    for key, tensor in state.items():
        for pattern, ours in NAMES.items():
            if re.match(pattern, key):
                found[re.sub(pattern, ours, key)] = tensor
    for kind in ("weight", "bias"):
        parts = [
            f"text_enhancer_layer.self_attn.{part}.{kind}" for part in ("query", "key", "value")
        ]
        found[f"token_layers.0.self_attn.in_proj_{kind}"] = torch.cat([state[p] for p in parts])
    return found


@pytest.mark.parametrize("phrases", [False, True], ids=["all see each other", "phrases"])
def test_a_layer_is_that_of_hugging_face(phrases: bool) -> None:
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        d_model=WIDTH, encoder_attention_heads=HEADS, encoder_ffn_dim=24, encoder_n_points=2,
        num_feature_levels=3, dropout=0.0,
    )  # fmt: skip
    theirs = GroundingDinoEncoderLayer(config).double().eval()
    perturb(theirs)
    ours, levels = encoder(num_layers=1).eval(), levels_of()
    tokens = ours.class_tokens.weight
    ours.load_state_dict({**renamed(theirs.state_dict()), "class_tokens.weight": tokens})
    together, pos = torch.ones(CLASSES, CLASSES, dtype=torch.bool), torch.zeros(CLASSES, WIDTH)
    if phrases:  # of two words and of three
        phrase = torch.tensor([0, 0, 1, 1, 1])
        together = phrase[:, None] == phrase
        pos = torch.randn(CLASSES, WIDTH)
        ours.token_apart, ours.token_pos = ~together, pos.double()
    sizes = torch.tensor(levels.spatial_shapes)
    (image, text), _ = theirs(
        vision_features=levels.tokens,
        vision_position_embedding=levels.pos,
        spatial_shapes=sizes,
        spatial_shapes_list=levels.spatial_shapes,
        level_start_index=torch.cat([torch.zeros(1), sizes.prod(1).cumsum(0)[:-1]]).long(),
        key_padding_mask=levels.padding_mask,
        reference_points=cell_centres(levels),
        text_features=tokens.expand(2, -1, -1),
        text_attention_mask=torch.zeros(2, CLASSES, dtype=torch.bool),
        text_position_embedding=pos.double().expand(2, -1, -1),
        text_self_attention_masks=~together.expand(2, -1, -1),
    )
    memory, found = ours(levels)
    torch.testing.assert_close(found, text)
    torch.testing.assert_close(memory, image)


def test_a_layer_has_the_published_number_of_parameters() -> None:
    sizes = {"d_model": 256, "n_heads": 8, "d_ffn": 2048, "n_levels": 4, "n_points": 4}
    made = encoder(num_layers=1, **sizes)
    parts = (made.fusions, made.token_layers, made.layers)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [1_579_008, 789_760, 1_282_176]
    assert sum(counts) == 3_650_944


def test_padding_changes_nothing() -> None:
    model = encoder()
    features, pos = random_maps(1, 2)
    levels = padded_levels(features, pos)
    memory, tokens = model(levels)
    other_features, other_pos = random_maps(2, 2)
    for kept, new in zip(features + pos, other_features + other_pos, strict=True):
        height, width = VALID[SHAPES.index((kept.shape[2], kept.shape[3]))]
        new[1, :, :height, :width] = kept[1, :, :height, :width]
        new[0] = kept[0]
    other_memory, other_tokens = model(padded_levels(other_features, other_pos))
    torch.testing.assert_close(other_tokens, tokens)
    torch.testing.assert_close(second_image(levels, other_memory), second_image(levels, memory))


def test_classes_and_images_learn_of_each_other() -> None:
    model, levels = encoder(num_layers=1), levels_of()
    memory, tokens = model(levels)
    assert not tokens[0].equal(tokens[1])  # the images differ
    with torch.no_grad():
        model.class_tokens.weight[2] += torch.randn(WIDTH)
    other_memory, other_tokens = model(levels)
    assert (other_tokens != tokens).any(-1).all()
    assert (other_memory != memory).any(-1)[~levels.padding_mask].all()


def test_every_parameter_learns() -> None:
    model = encoder()
    memory, tokens = model(levels_of())
    (memory.square().sum() + tokens.pow(3).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_with_a_scale_of_0_both_sides_are_only_normed() -> None:
    model, levels = encoder(num_layers=1), levels_of()
    fusion = model.fusions[0]
    assert isinstance(fusion, Fusion)
    fusion.image_scale.zero_()
    fusion.token_scale.zero_()
    given = model.class_tokens.weight.expand(2, -1, -1)
    found = fusion(levels.tokens, given, levels.padding_mask)
    norms = (fusion.image_norm, fusion.token_norm)
    for side, norm, values in zip((levels.tokens, given), norms, found, strict=True):
        assert torch.equal(values, F.layer_norm(side, (WIDTH,), norm.weight, norm.bias))


@torch.no_grad()
def test_without_fusion_and_its_norm_it_is_the_paper_s_encoder() -> None:
    model, levels = encoder(), levels_of()
    for fusion in model.fusions:
        assert isinstance(fusion, Fusion)
        fusion.image_scale.zero_()
        fusion.image_norm.register_forward_hook(lambda _, inputs, output: inputs[0])
    plain = ENCODERS["deformable"](
        EncoderOptions(
            d_model=WIDTH, num_layers=2, d_ffn=24, dropout=0.0, n_levels=3, n_heads=HEADS,
            n_points=2,
        )
    ).double()  # fmt: skip
    own = model.state_dict()
    plain.load_state_dict({key: own[key] for key in plain.state_dict()})
    assert torch.equal(model(levels)[0], plain(levels))


def test_the_order_of_classes_is_that_of_their_tokens_alone() -> None:
    model = small_model(num_classes=CLASSES, encoder_attn="enhancer", decoder_tokens=True)
    model.requires_grad_(False)
    torch.manual_seed(1)
    batch = pad_images(random_images((60, 90), (75, 64)))
    before, order = model(batch)["pred_logits"], [3, 0, 4, 1, 2]
    state = model.state_dict()
    for key in ("transformer.encoder.class_tokens.weight", "class_embed.0.bias"):
        state[key].copy_(state[key][order].clone())
    torch.testing.assert_close(model(batch)["pred_logits"], before[..., order])
    assert not torch.isclose(before, before[..., order]).all()


def test_scores_are_products_of_queries_and_tokens() -> None:
    torch.manual_seed(0)
    head = ContrastiveHead(WIDTH, CLASSES)
    perturb(head)
    x, tokens = torch.randn(2, 7, WIDTH), torch.randn(2, CLASSES, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x.bfloat16(), tokens)
    assert found.dtype == torch.float32
    for image in range(2):
        for query in range(7):
            for label in range(CLASSES):
                product = x.bfloat16()[image, query].double() @ tokens[image, label].double()
                expected = product * head.scale.double() + head.bias[label].double()
                assert found[image, query, label].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_new_model_scores_everything_near_one_percent() -> None:
    torch.manual_seed(0)
    model = built(small_config(encoder_attn="enhancer", decoder_tokens=True), CLASSES).eval()
    with torch.no_grad():
        scores = model(pad_images([torch.randn(3, 64, 96)]))["pred_logits"].sigmoid()
    assert 0.0005 < scores.min() < scores.max() < 0.2


def test_tokens_and_biases_of_classes_follow_their_names() -> None:
    options: dict[str, Any] = {
        "encoder_attn": "enhancer", "decoder_tokens": True, "with_box_refine": True,
        "two_stage": True, "mixed_query_selection": True, "class_proposals": True,
    }  # fmt: skip
    source, target = (build_model(small_config(**options), num_classes=n) for n in (3, 2))
    perturb(source)
    given = source.state_dict()
    report = transfer(
        target,
        given,
        source_classes=Classes((1, 2, 3), ("cat", "dog", "cow")),
        target_classes=Classes((1, 2), ("cow", "sheep")),
        proposal_scores="classes",
    )
    found, name = target.state_dict(), "transformer.encoder.class_tokens.weight"
    assert found[name][0].equal(given[name][2])
    assert not any(found[name][1].equal(row) for row in given[name])
    for head in (0, 3):
        assert found[f"class_embed.{head}.bias"][0] == given[f"class_embed.{head}.bias"][2]
        assert found[f"class_embed.{head}.scale"] == given[f"class_embed.{head}.scale"]
    assert name in report.by_name
    assert not report.reinitialised


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_attn": "mswin+enhancer"}, "enhancer comes alone"),
        ({"encoder_attn": "enhancer", "nheads": 1}, "`nheads` must be even.*not 1 and 48"),
        ({"encoder_attn": "enhancer", "dim_feedforward": 50}, "a multiple of it, not 4 and 50"),
        ({"encoder_attn": "enhancer", "enc_fusion": "mlp"}, "combined with `enc_fusion mlp`"),
        ({"encoder_attn": "enhancer", "scores": "softmax"}, "combined with `scores softmax`"),
        ({"encoder_attn": "enhancer", "encoder_updates": "lite"}, "with `encoder_updates lite`"),
        ({"encoder": "enhancer"}, "choose it by `encoder_attn enhancer`"),
        ({"decoder_tokens": True}, "no effect without `encoder_attn enhancer`"),
        (
            {"encoder_attn": "enhancer", "decoder_tokens": True, "decoder_attn": "dense"},
            "cannot be combined with `decoder_tokens`",
        ),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(small_config(**options), num_classes=3)
