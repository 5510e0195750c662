"""Encoders whose layers change some of the tokens, and memory made of several layers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.encoders import ENCODERS, EncoderOptions
from models.encoders.deformable import DeformableEncoder
from models.levels import FeatureLevels, cell_centres, join_levels
from tests.unit.models.small import VARIANTS, perturb, random_images, small_config, small_model
from util.batch import pad_images
from util.errors import ConfigError

WIDTH, SHAPES = 32, [(4, 6), (2, 3), (1, 2)]
FINE = 4 * 6


def encoder(**options: Any) -> DeformableEncoder:
    """Return a perturbed float64 encoder of three levels; equal options, equal weights."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "d_model": WIDTH, "num_layers": 4, "d_ffn": 24, "dropout": 0.0, "n_levels": 3,
        "n_heads": 4, "n_points": 2,
    }  # fmt: skip
    made = ENCODERS["deformable"](EncoderOptions(**(values | options))).double()
    perturb(made)
    assert isinstance(made, DeformableEncoder)
    return made


def feature_levels() -> FeatureLevels:
    """Return random levels of two images, the second of which is padded at the right."""
    torch.manual_seed(1)
    features, pos = ([torch.randn(2, WIDTH, *s).double() for s in SHAPES] for _ in range(2))
    masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in SHAPES]
    for mask, (_, width) in zip(masks, SHAPES, strict=True):
        mask[1, :, -(-width // 2) :] = True
    return join_levels(features, masks, pos, torch.randn(3, WIDTH).double())


def full(**options: Any) -> DeformableEncoder:
    """Return the encoder that changes all tokens, with the weights of the other one."""
    made = encoder()
    made.load_state_dict(encoder(**options).state_dict())
    return made


def test_with_as_many_full_layers_as_layers_it_is_the_paper_s_encoder() -> None:
    levels = feature_levels()
    lite = encoder(updates="lite", lite_levels=2, lite_expansion=4)
    assert torch.equal(lite(levels), full(updates="lite")(levels))


@pytest.mark.parametrize("levels_often", [1, 2])
def test_between_full_layers_coarse_tokens_change_alone(levels_often: int) -> None:
    levels = feature_levels()
    lite = encoder(updates="lite", lite_levels=levels_often, lite_expansion=2)
    fine = sum(h * w for h, w in SHAPES[:-levels_often])
    x = levels.tokens
    for index, layer in enumerate(full(updates="lite").layers):
        everything = layer(x, levels.pos, cell_centres(levels), x, levels)
        x = everything if index in (1, 3) else torch.cat([x[:, :fine], everything[:, fine:]], 1)
    torch.testing.assert_close(lite(levels), x)


def test_fine_tokens_teach_what_is_before_them_between_full_layers_too() -> None:
    levels = feature_levels()
    levels.tokens.requires_grad_()
    lite = encoder(updates="lite", lite_levels=2)
    coarse = lite.update(0, levels.tokens, levels, cell_centres(levels))[:, FINE:]
    (gradient,) = torch.autograd.grad(coarse.square().sum(), levels.tokens)
    assert gradient[0, :FINE].any(-1).double().mean() > 0.5  # those that are looked at


def test_lite_has_the_keys_of_the_full_encoder() -> None:
    assert encoder(updates="lite").state_dict().keys() == encoder().state_dict().keys()


def test_dense_memory_is_one_linear_map_of_all_depths_and_a_norm() -> None:
    levels = feature_levels()
    dense = encoder(fusion="dense")
    state = dense.state_dict()
    assert state["fusion_layer.0.weight"].shape == (WIDTH, 5 * WIDTH)
    depths: list[Tensor] = [levels.tokens]
    plain = encoder()
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("fusion_layer")})
    for layer in plain.layers:
        depths.append(layer(depths[-1], levels.pos, cell_centres(levels), depths[-1], levels))
    mixed = sum(
        depth @ state["fusion_layer.0.weight"][:, i * WIDTH : (i + 1) * WIDTH].T
        for i, depth in enumerate(depths)
    )
    mixed = mixed + state["fusion_layer.0.bias"]
    mixed = (mixed - mixed.mean(-1, keepdim=True)) / (
        mixed.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    expected = mixed * state["fusion_layer.1.weight"] + state["fusion_layer.1.bias"]
    torch.testing.assert_close(dense(levels), expected)


def test_memory_through_two_linear_layers_is_a_function_of_all_depths() -> None:
    levels = feature_levels()
    mlp = encoder(fusion="mlp")
    state = mlp.state_dict()
    plain = encoder()
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("memory_fusion")})
    depths: list[Tensor] = [levels.tokens]
    for layer in plain.layers:
        depths.append(layer(depths[-1], levels.pos, cell_centres(levels), depths[-1], levels))
    first, second, norm = (
        (state[f"memory_fusion.{i}.weight"], state[f"memory_fusion.{i}.bias"]) for i in (0, 2, 3)
    )
    hidden = (torch.cat(depths, dim=-1) @ first[0].T + first[1]).clamp(min=0)
    mixed = hidden @ second[0].T + second[1]
    variance = mixed.var(-1, keepdim=True, correction=0)
    expected = (mixed - mixed.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * norm[0] + norm[1]
    torch.testing.assert_close(mlp(levels), expected)


def test_dense_fusion_starts_without_a_bias_and_adds_its_keys_alone() -> None:
    options = VARIANTS["two_stage"]
    plain, dense = (
        build_model(small_config(enc_fusion=fusion, **options), num_classes=5).state_dict()
        for fusion in ("none", "dense")
    )
    prefix = "transformer.encoder.fusion_layer"  # the published key
    more = {f"{prefix}.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert dense.keys() - plain.keys() == more
    assert not dense[f"{prefix}.0.bias"].any()


def detect(model: DeformableDETR, *sizes: tuple[int, int]) -> Tensor:
    """Return the logits of the first of random images of these sizes, which are always the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        logits: Tensor = model(pad_images(random_images(*sizes), 128))["pred_logits"][0]
    return logits


@pytest.mark.parametrize(
    "options",
    [{"encoder_updates": "lite"}, {"enc_fusion": "dense"}, {"encoder_updates": "sparse"}],
    ids=str,
)
def test_images_of_a_batch_do_not_change_each_other(options: dict[str, Any]) -> None:
    model = small_model(**VARIANTS["two_stage"], **options)
    alone, together = detect(model, (96, 70)), detect(model, (96, 70), (128, 128))
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder_updates": "lite", "encoder": "mine"},
            "encoder_updates: has no effect without `encoder deform",
        ),
        (
            {"enc_fusion": "dense", "encoder": "mine"},
            "enc_fusion: has no effect without `encoder deformable`",
        ),
        ({"encoder_updates": "lite", "num_feature_levels": 1}, "needs a coarse level and a fine"),
        ({"encoder_updates": "lite", "lite_levels": 4}, "needs a coarse level and a fine"),
        ({"encoder_updates": "lite", "enc_layers": 6, "lite_expansion": 4}, "a divisor of"),
        (
            {"encoder_updates": "sparse", "decoder_attn": "dense"},
            "encoder_updates sparse: learns from the places that the decoder looks at",
        ),
        ({"encoder_updates": "sparse", "rho": 0.0}, "rho: must be"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**options)
