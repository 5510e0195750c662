"""Under autocast, what is a place or a score stays in float32; the rest may be rounded."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from models.backbones import create_backbone
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.layers import ExactLayerNorm
from models.queries import DetectorOutput
from tests.unit.models.small import VARIANTS, perturb, random_images, small_config
from util.batch import PaddedBatch, pad_images

variants = pytest.mark.parametrize("variant", VARIANTS)


def small(variant: str) -> DeformableDETR:
    """Return a float32 detector."""
    options = VARIANTS[variant] | {"backbone": "resnet18"}
    model = build_model(small_config(**options), num_classes=5).eval()
    perturb(model)
    return model


def padded_batch() -> PaddedBatch:
    """Return images with padding on both."""
    return pad_images([image.float() for image in random_images((96, 64), (64, 128))])


def share_in_bfloat16(values: Tensor) -> float:
    """Return the share of values that bfloat16 holds exactly."""
    return float((values.bfloat16().to(values.dtype) == values).double().mean())


def in_bfloat16() -> torch.autocast:
    """Return autocast to bfloat16 on the CPU."""
    return torch.autocast("cpu", torch.bfloat16)


def predictions(outputs: DetectorOutput) -> dict[str, Tensor]:
    """Return every tensor by name."""
    named = {"pred_logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]}
    for group in outputs["groups"]:
        named |= {f"{group.name} logits": group.logits, f"{group.name} boxes": group.boxes}
    return named


@pytest.mark.long
@variants
def test_predictions_are_exact_and_near_those_of_float32(variant: str) -> None:
    model, batch = small(variant), padded_batch()
    model.transformer.num_queries = 10**6  # every token, as rounding could choose other proposals
    with torch.no_grad():
        expected = model(batch)
        with in_bfloat16():
            found = model(batch)
    wanted_by_name, found_by_name = predictions(expected), predictions(found)
    for name, wanted in wanted_by_name.items():
        value = found_by_name[name]
        assert value.dtype == torch.float32, name
        assert share_in_bfloat16(value[(value != 0) & (value != 1)]) < 0.05, name
        if variant != "two_stage" or name.startswith("_enc"):  # proposals come in another order
            tolerance = 0.02 if "boxes" in name else 0.1
            assert (value - wanted).abs().mean() < tolerance * wanted.std(), name


@pytest.mark.long
@variants
def test_reference_points_are_exact(variant: str) -> None:
    model = small(variant)
    query_embed = None if model.query_embed is None else model.query_embed.weight
    with torch.no_grad(), in_bfloat16():
        output = model.transformer(*model.feature_levels(padded_batch()), query_embed)
    for reference in output.decoder.references:
        assert reference.dtype == torch.float32
        assert share_in_bfloat16(reference) < 0.1
    for box in output.decoder.boxes:
        assert box.dtype == torch.float32


@pytest.mark.long
@variants
def test_gradients_are_float32_and_near_those_of_float32(variant: str) -> None:
    torch.manual_seed(0)
    batch = padded_batch()
    model = build_model(
        small_config(**VARIANTS[variant] | {"backbone": "resnet18"}), num_classes=5
    ).eval()
    model.transformer.num_queries = 10**6
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(batch)
        total = torch.stack([v.square().mean() for v in predictions(outputs).values()]).sum()
        torch.autograd.backward(total)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    largest = max(float(g.norm()) for g in found[0].values())
    for name, wanted in found[0].items():
        value = found[1][name]
        assert value.dtype == torch.float32, name
        assert (value - wanted).norm() < 0.2 * wanted.norm() + 1e-3 * largest, name


def test_gradients_of_a_norm_are_summed_over_many_tokens_in_float32() -> None:
    tokens, width = 5000, 8
    norm = ExactLayerNorm(width)
    with in_bfloat16():
        output = norm(torch.randn(tokens, width).bfloat16())
    torch.autograd.backward(output, torch.full_like(output, 0.01))
    assert output.dtype == torch.float32
    torch.testing.assert_close(norm.bias.grad, torch.full((width,), 50.0), rtol=1e-3, atol=0)


def test_norms_of_a_timm_backbone_sum_their_gradients_in_float32() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("timm/convnext_atto", frozen_stages=0)
    assert isinstance(backbone, nn.Module)
    images, found = torch.randn(1, 3, 256, 256), []
    for enabled in (False, True):
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            maps = backbone.eval()(images)
        torch.autograd.backward(torch.stack([m.float().mean() * 1e3 for m in maps]).sum())
        norms = [m for m in backbone.modules() if isinstance(m, nn.LayerNorm)]
        found.append([m.bias.grad for m in norms if m.bias.grad is not None])
    for wanted, value in zip(*found, strict=True):
        assert (value - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.long
@pytest.mark.parametrize("name", ["timm/tf_efficientnet_lite0", "timm/mobilenetv3_small_050"])
def test_depthwise_convolutions_of_a_cpu_stay_in_float32(name: str) -> None:
    backbone = cast(nn.Module, create_backbone(name))
    found: dict[str, tuple[bool, Tensor, Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        found[names[module]] = module.groups > 1, inputs[0].detach(), output.detach()

    names = {module: name for name, module in backbone.named_modules()}
    convolutions = [m for m in names if isinstance(m, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(note)
    with in_bfloat16():
        maps = backbone(random_images((64, 96))[0].float()[None])
    torch.autograd.backward(torch.stack([m.float().square().mean() for m in maps]).sum())
    assert {depthwise for depthwise, *_ in found.values()} == {True, False}
    for key, (depthwise, image, output) in found.items():
        assert output.dtype == (torch.float32 if depthwise else torch.bfloat16), key
        if depthwise:
            with torch.no_grad():
                assert output.equal(backbone.get_submodule(key)(image.float())), key
    assert all(m.weight.grad is None or m.weight.grad.isfinite().all() for m in convolutions)
