"""Values recorded from the published implementation: forward, matching, losses, gradients, start.

The recordings are float64, but for the parts the published code computes in float32 whatever the
model's dtype (positional encoding, encoder reference points); those bound the agreement to 1e-5.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import LossConfig, ModelConfig
from models.build import build_criterion, build_model
from models.deformable_detr import DeformableDETR
from models.matcher import HungarianMatcher, pad_targets
from models.postprocess import PostProcess
from models.queries import DetectorOutput
from tests.unit.models.small import group_of
from util.batch import pad_images

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refine": {"with_box_refine": True},
    "refine_two_stage": {"with_box_refine": True, "two_stage": True},
    "single_scale": {"num_feature_levels": 1},
    "single_scale_dc5": {"num_feature_levels": 1, "dilation": True},
}
PARAMETERS = {
    "plain": 40_069_665,
    "refine": 40_849_660,
    "refine_two_stage": 41_181_529,
    "single_scale": 34_066_593,
    "single_scale_dc5": 34_066_593,
}
Find = Callable[[str], Path]


@dataclass(frozen=True)
class Recorded:
    """One forward and backward of ours beside what was recorded."""

    fill: ModuleType
    json: dict[str, Any]
    arrays: dict[str, Tensor]
    model: DeformableDETR
    output: DetectorOutput
    losses: dict[str, Tensor]


@pytest.fixture(scope="module")
def recorded(shared: Find) -> Recorded:
    """Fill the published architecture with the recorded weights and run it on the same input."""
    spec = importlib.util.spec_from_file_location("fill", shared("reference/fill.py"))
    assert spec is not None
    assert spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    values = json.loads(shared("reference/plain.json").read_text())
    archive = np.load(shared("reference/plain.npz"))
    model = build_model(ModelConfig(), num_classes=91).double().eval()
    model.load_state_dict(fill.fill(model.state_dict(), values["seed"], True))
    output = model(pad_images(fill.images(values["seed"], torch.float64)))
    losses = build_criterion(LossConfig())(output, fill.targets(values["seed"], torch.float64))
    torch.autograd.backward(losses["loss"])
    arrays = {name: torch.from_numpy(archive[name]) for name in archive}
    return Recorded(fill, values, arrays, model, output, losses)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare with a tolerance relative to the largest expected value."""
    scale = float(expected.double().abs().max())
    torch.testing.assert_close(
        found.detach().double(), expected.double(), rtol=0, atol=tolerance * scale
    )


def test_inputs_and_weights_are_the_recorded_ones(recorded: Recorded) -> None:
    images = recorded.fill.images(recorded.json["seed"], torch.float64)
    for i, image in enumerate(images):
        found = recorded.fill.fingerprint(image, f"image.{i}")
        assert found[:4] == pytest.approx(recorded.json["image_fp"][i][:4], rel=1e-6)


def test_outputs_of_the_last_layer(recorded: Recorded) -> None:
    assert_near(recorded.output["pred_logits"], recorded.arrays["logits"], 1e-5)
    assert_near(recorded.output["pred_boxes"], recorded.arrays["boxes"], 1e-5)


@pytest.mark.parametrize("layer", range(5))
def test_outputs_of_the_other_layers(recorded: Recorded, layer: int) -> None:
    for name in ("logits", "boxes"):
        key = f"aux{layer}.pred_{name}"
        tensors = getattr(group_of(recorded.output), name)
        found = torch.tensor(recorded.fill.fingerprint(tensors[layer], key))
        assert_near(found, torch.tensor(recorded.json["fp"][key]), 1e-5)


def test_matches_of_every_layer(recorded: Recorded) -> None:
    targets = pad_targets(
        recorded.fill.targets(recorded.json["seed"], torch.float64), torch.device("cpu")
    )
    group = group_of(recorded.output)
    (matches,) = HungarianMatcher()([(group.logits, group.boxes, targets)])
    for layer, name in enumerate(["aux0", "aux1", "aux2", "aux3", "aux4", "final"]):
        for image, (queries, chosen) in enumerate(recorded.json["match"][name]):
            kept = matches.image == image
            found = zip(matches.query[layer, kept], matches.target[layer, kept], strict=True)
            expected = set(zip(queries, chosen, strict=True))
            assert {(int(q), int(t)) for q, t in found} == expected


def test_losses(recorded: Recorded) -> None:
    expected = {k: v for k, v in recorded.json["losses"].items() if "cardinality" not in k}
    expected["loss"] = expected.pop("TOTAL")
    assert set(recorded.losses) == set(expected)
    for name, value in expected.items():
        assert recorded.losses[name].item() == pytest.approx(value, rel=1e-5), name


def test_loss_weights(recorded: Recorded) -> None:
    criterion = build_criterion(LossConfig())
    for name, weight in recorded.json["weights"].items():
        assert criterion.weight(name) == weight


def test_gradients(recorded: Recorded) -> None:
    # a shared head has several names; the recording uses all of them
    parameters = dict(recorded.model.named_parameters(remove_duplicate=False))
    for name, (norm, *projections) in recorded.json["grads"].items():
        if name == "TOTAL_NORM":
            continue
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=3e-3), name
        for k, projection in enumerate(projections):
            direction = recorded.fill.randn(name, gradient.shape, 7, k)
            assert (gradient * direction).sum().item() == pytest.approx(projection, abs=3e-3 * norm)
    squares = [p.grad.square().sum() for p in recorded.model.parameters() if p.grad is not None]
    total = recorded.json["grads"]["TOTAL_NORM"][0]
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(total, rel=3e-3)


def test_detections(recorded: Recorded) -> None:
    found = PostProcess()(recorded.output, torch.tensor(recorded.fill.ORIG_SIZES))
    for image, result in enumerate(found):
        assert_near(result["scores"], recorded.arrays["scores"][image], 1e-5)
        assert result["labels"].tolist() == recorded.arrays["labels"][image].tolist()
        assert_near(result["boxes"], recorded.arrays["det_boxes"][image], 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_and_parameter_count(variant: str, shared: Find) -> None:
    keys = json.loads(shared("reference/state_dict_keys.json").read_text())[variant]
    with torch.device("meta"):
        model = build_model(ModelConfig(**VARIANTS[variant]), num_classes=91)
    found = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    expected = list(keys.items()) if isinstance(keys, dict) else [(k, list(s)) for k, s in keys]
    assert found == expected
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[variant]


def test_fresh_initialisation(shared: Find) -> None:
    statistics = json.loads(shared("reference/plain.json").read_text())["init"]
    state = build_model(ModelConfig(), num_classes=91).state_dict()
    assert set(statistics) == {name for name in state if not name.startswith("backbone.")}
    for name, expected in statistics.items():
        tensor = state[name].double()
        if "fixed" in expected:
            wanted = torch.tensor(expected["fixed"], dtype=torch.float64).expand(tensor.numel())
            torch.testing.assert_close(tensor.flatten(), wanted, rtol=1e-6, atol=1e-6, msg=name)
            continue
        # the recorded numbers are themselves a sample of this size
        n, std = tensor.numel(), expected["std"]
        assert abs(float(tensor.mean()) - expected["mean"]) < 8 * std * math.sqrt(2 / n), name
        assert float(tensor.std()) == pytest.approx(std, rel=8 / math.sqrt(n)), name
        if expected["absmax"] < 2 * std:  # a uniform distribution has a sharp edge
            assert tensor.abs().max() <= expected["absmax"] * (1 + 30 / n), name
