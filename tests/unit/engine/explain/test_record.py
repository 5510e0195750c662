"""Points and weights against what attention returned: summed up by hand, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.explain.record import deformable_attention, query_weights, recording
from models.deformable_detr import DeformableDETR
from ops import MSDeformAttn
from tests.unit.models.small import VARIANTS, random_images, small_model
from util.batch import pad_images

SIZES = [(60, 90), (75, 64)]
CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "single scale": {"num_feature_levels": 1},
    "relation": {**VARIANTS["two_stage"], "relation": "previous"},
}


def model_of(**options: Any) -> DeformableDETR:
    """Return a small model; building it takes gradients, which the tests do without."""
    with torch.enable_grad():
        return small_model(**options)


def cell(values: Tensor, row: int, column: int) -> Tensor:
    """Return the value of a cell, zeros outside the map. Shape: values [H,W,D] -> [D]."""
    inside = 0 <= row < values.shape[0] and 0 <= column < values.shape[1]
    return values[row, column] if inside else torch.zeros_like(values[0, 0])


def bilinear(values: Tensor, x: float, y: float) -> Tensor:
    """Return a map's value at fractions of its width and height; cells are at their centres."""
    x, y = x * values.shape[1] - 0.5, y * values.shape[0] - 0.5
    left, top = math.floor(x), math.floor(y)
    right, bottom = x - left, y - top  # the shares of the cells there
    return (
        (1 - bottom) * ((1 - right) * cell(values, top, left) + right * cell(values, top, left + 1))
        + bottom * (1 - right) * cell(values, top + 1, left)
        + bottom * right * cell(values, top + 1, left + 1)
    )


def read(
    module: MSDeformAttn, inputs: dict[str, Any], locations: Tensor, weights: Tensor, image: int
) -> Tensor:
    """Return what one query gets from points and weights. Shape: [M,L,K,2], [M,L,K] -> [C]."""
    value = module.value_proj(inputs["tokens"][image])
    value = value.masked_fill(inputs["mask"][image, :, None], 0.0)
    width = value.shape[1] // module.n_heads
    found = []
    for head in range(module.n_heads):
        part, first = torch.zeros(width, dtype=torch.float64), 0
        for level, (height, columns) in enumerate(inputs["shapes"]):
            tokens = value[first : first + height * columns, head * width : (head + 1) * width]
            for k in range(module.n_points):
                x, y = locations[head, level, k].tolist()
                sample = bilinear(tokens.view(height, columns, width), x, y)
                part = part + weights[head, level, k] * sample
            first += height * columns
        found.append(part)
    output: Tensor = module.output_proj(torch.cat(found))
    return output


class Calls:
    """Inputs and outputs of modules, kept by hooks of the test's own."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        for module in modules:
            module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, inputs: Any, options: dict[str, Any], output: Any) -> None:
        entry = dict(options)
        if isinstance(module, MSDeformAttn):
            entry = {
                "tokens": inputs[2],
                "shapes": inputs[3],
                "mask": options["input_padding_mask"],
            }
        self.inputs.append(entry | {"positional": inputs})
        self.outputs.append(output)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_points_and_weights_give_what_cross_attention_returned(name: str) -> None:
    model = model_of(**CASES[name])
    layers: Any = model.transformer.decoder.layers
    calls = Calls([layer.cross_attn for layer in layers])
    with recording(model) as record:
        model(pad_images(random_images(*SIZES)))
    assert len(record.looks) == len(layers) == len(calls.outputs)
    for look, inputs, output in zip(record.looks, calls.inputs, calls.outputs, strict=True):
        locations, weights = look.samples(torch.tensor([4, 1]))
        torch.testing.assert_close(
            weights.sum((3, 4)), torch.ones_like(weights[..., 0, 0]), atol=1e-14, rtol=0
        )
        assert float(weights.min()) > 0
        for image in range(2):
            for row, query in enumerate((4, 1)):
                expected = output[image, query]
                actual = read(
                    look.module, inputs, locations[image, row], weights[image, row], image
                )
                torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("updates", ["full", "lite"])
def test_a_tokens_points_give_what_self_attention_returned(updates: str) -> None:
    """Lite layers change the coarsest level alone: they are not asked about a finer token."""
    model = model_of(encoder_updates=updates)
    calls = Calls(list[nn.Module](deformable_attention(model)))
    images = pad_images(random_images((64, 96)))
    for back in (1, 40):  # a token of the coarsest level, and a finer one
        calls.inputs.clear()
        calls.outputs.clear()
        with recording(model, lambda shapes, back=back: sum(h * w for h, w in shapes) - back) as r:  # type: ignore[misc]
            model(images)
        changed = [True, True] if updates == "full" or back == 1 else [False, True]
        assert [look is not None for look in r.token_looks] == changed
        for look, inputs, output in zip(r.token_looks, calls.inputs, calls.outputs, strict=True):
            if look is None:
                continue
            locations, weights = look.samples(torch.tensor([0]))
            actual = read(look.module, inputs, locations[0, 0], weights[0, 0], 0)
            torch.testing.assert_close(actual, output[0, -back], atol=1e-11, rtol=0)


@torch.no_grad()
def test_a_sparse_encoder_is_asked_about_the_tokens_that_it_changes() -> None:
    model = model_of(encoder_updates="sparse")
    modules = deformable_attention(model)
    calls, images = Calls(list[nn.Module](modules)), pad_images(random_images((64, 96)))
    states: list[Tensor] = []
    model.transformer.encoder.register_forward_hook(
        lambda _, inputs, memory: states.extend((inputs[0].tokens[0], memory[0]))
    )
    asked = {True: 0, False: 0}
    for place in range(0, 60, 3):
        calls.inputs.clear()
        calls.outputs.clear()
        states.clear()
        with recording(model, lambda shapes, place=place: place) as r:  # type: ignore[misc]
            model(images)
        changes = not torch.equal(states[0][place], states[1][place])
        asked[changes] += 1
        assert [look is not None for look in r.token_looks] == [changes] * len(modules)
        for look, inputs, output in zip(r.token_looks, calls.inputs, calls.outputs, strict=True):
            if look is None:
                continue
            locations, weights = look.samples(torch.tensor([0]))
            actual = read(look.module, inputs, locations[0, 0], weights[0, 0], 0)
            assert (output[0] - actual).abs().amax(-1).min() < 1e-11  # of one of the rows
    assert min(asked.values()) > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "relation"])
def test_attention_among_queries_gives_what_its_module_returned(name: str) -> None:
    model = model_of(**CASES[name])
    modules: list[Any] = [layer.self_attn for layer in model.transformer.decoder.layers]
    calls = Calls(modules)
    with recording(model) as record:
        model(pad_images(random_images(SIZES[0])))
    outputs = list(calls.outputs)
    weights = query_weights(record, torch.tensor([6, 2]))  # [layers,2,M,Q]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for layer, module in enumerate(modules):
        value = calls.inputs[layer]["positional"][2][0]
        width = value.shape[1]
        projected = value @ module.in_proj_weight[2 * width :].T + module.in_proj_bias[2 * width :]
        per_head = projected.view(len(value), module.num_heads, -1)
        mixed = torch.einsum("rmq,qmd->rmd", weights[layer], per_head).flatten(1)
        torch.testing.assert_close(module.out_proj(mixed), outputs[layer][0][0, [6, 2]])


@torch.no_grad()
def test_recording_changes_no_bit_and_leaves_nothing_behind() -> None:
    model = model_of(**VARIANTS["two_stage"]).float()
    images = pad_images([image.float() for image in random_images(SIZES[0])])
    before = model(images)
    with recording(model, lambda shapes: 0) as record:
        during = model(images)
    assert len(record.token_looks) == 2
    for key in ("pred_logits", "pred_boxes"):
        assert during[key].equal(before[key])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(images)
    assert len(record.looks) == 3
