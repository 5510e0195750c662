"""Operations and parameters against counts by hand."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.benchmark.counts import (
    PARTS,
    attention_flops,
    flops_by_part,
    parameters_by_part,
)
from models.build import build_model
from ops import MSDeformAttn
from tests.unit.models.small import VARIANTS, small_config
from util.batch import pad_images

SIZE = (64, 96)


def test_attention_is_counted_as_its_loops_run() -> None:
    n, queries, heads, shapes, k, d = 2, 3, 2, [(4, 5), (2, 3)], 3, 4
    counted = 0
    for _image, _query, _head, _level, _point in itertools.product(
        range(n), range(queries), range(heads), range(len(shapes)), range(k)
    ):
        for _cell in range(4):
            for _channel in range(d):
                counted += 2  # sum = sum + weight * value
    value, weights = (n, 26, heads, d), (n, queries, heads, len(shapes), k)
    assert attention_flops(value, None, None, weights, None, out_shape=None) == counted


def operations(module: nn.Module, inputs: Any, output: Any) -> int:
    """Return the multiplications and additions of one layer, from what it was given."""
    if isinstance(module, nn.Conv2d):
        taps = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
        return 2 * taps * int(output.numel())
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * int(output.numel())
    if isinstance(module, MSDeformAttn):  # its projections are linear layers of their own
        samples = output.shape[0] * output.shape[1] * module.n_levels * module.n_points
        return int(samples * output.shape[2] * 8)  # M heads of D channels
    assert isinstance(module, nn.MultiheadAttention)
    n, q, width = output[0].shape
    projections = 4 * 2 * n * q * width * width
    return int(projections + 2 * 2 * n * q * q * width)


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_operations_are_those_of_the_layers_that_ran(name: str) -> None:
    with torch.enable_grad():
        model = build_model(small_config(**VARIANTS[name]), num_classes=5).eval()
    owners = {"backbone.": "backbone", "input_proj.": "projections and neck",
              "transformer.encoder.": "encoder", "transformer.decoder.layers.": "decoder",
              "class_embed.": "heads", "bbox_embed.": "heads",
              # the first of two names of the same modules
              "transformer.decoder.class_embed.": "heads",
              "transformer.decoder.bbox_embed.": "heads"}  # fmt: skip
    expected: Counter[str] = Counter()
    kinds = (nn.Conv2d, nn.Linear, MSDeformAttn, nn.MultiheadAttention)
    for path, module in model.named_modules():
        if isinstance(module, kinds) and not path.endswith("out_proj"):  # read, not called
            part = next((p for start, p in owners.items() if path.startswith(start)), "other")

            def count(module: nn.Module, inputs: Any, output: Any, part: str = part) -> None:
                expected[part] += operations(module, inputs, output)

            module.register_forward_hook(count)
    model(pad_images([torch.randn(3, *SIZE), torch.randn(3, *SIZE)]))
    by_hand = {part: expected[part] for part in PARTS}  # before the model runs again
    found = flops_by_part(model, 2, SIZE)
    assert tuple(found) == PARTS
    assert found == by_hand


@pytest.mark.long
def test_counting_leaves_the_model_as_it_is() -> None:
    model = build_model(small_config(), num_classes=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flops_by_part(model, 1, SIZE)
    assert model.training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", VARIANTS)
def test_each_parameter_belongs_to_one_part(name: str) -> None:
    model = build_model(small_config(**VARIANTS[name]), num_classes=5)
    counts = parameters_by_part(model)
    distinct: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    assert sum(counts.values()) == sum(p.numel() for p in distinct.values())
    heads = {id(p): p for m in (model.class_embed, model.bbox_embed) for p in m.parameters()}
    assert counts["heads"] == sum(p.numel() for p in heads.values())
    assert counts["backbone"] == sum(p.numel() for p in model.backbone.parameters())
    assert counts["encoder"] == sum(p.numel() for p in model.transformer.encoder.parameters())
    layers = model.transformer.decoder.layers
    assert counts["decoder"] == sum(p.numel() for p in layers.parameters())
