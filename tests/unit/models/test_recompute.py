"""Activations that are computed again give the same gradients, to the last bit."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import LossConfig, ModelConfig
from models.build import build_criterion, set_checkpointing
from models.deformable_detr import DeformableDETR
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, built, perturb, random_images, small_config
from util.batch import pad_images
from util.errors import ConfigError

CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "torchvision": {"backbone": "resnet18"},
    "torchvision, norms learn": {"backbone": "resnet18", "train_backbone_norm": True},
    "timm, norms learn": {"train_backbone_norm": True},
}


@functools.lru_cache(maxsize=1)
def _small(config: ModelConfig) -> DeformableDETR:
    torch.manual_seed(0)
    model = built(config, 5).double().train()
    perturb(model)
    return model


def small(**options: Any) -> DeformableDETR:
    """Return a float64 detector in training mode, with much dropout; the same each time."""
    return copy.deepcopy(_small(small_config(dropout=0.3, **options)))


def run_step(model: DeformableDETR) -> tuple[dict[str, Tensor], int]:
    """Return gradients and buffers after a step, and how many numbers the step kept for it."""
    torch.manual_seed(1)
    batch, targets = pad_images(random_images((40, 60), (50, 43))), random_targets([3, 2], 5)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(batch)
    torch.autograd.backward(build_criterion(LossConfig())(outputs, targets)["loss"])
    state = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return state | {n: b.clone() for n, b in model.named_buffers()}, sum(held.values())


@pytest.mark.long
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_gradients_and_statistics_are_the_same_bit_for_bit(options: dict[str, Any]) -> None:
    expected, kept = run_step(small(**options))
    for parts in ({"backbone"}, {"encoder", "decoder"}, ("backbone", "encoder", "decoder")):
        model = small(**options)
        set_checkpointing(model, parts)
        found, kept_now = run_step(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        assert kept_now < kept


@pytest.mark.long
def test_parts_that_are_not_named_keep_their_activations() -> None:
    model = small()
    set_checkpointing(model, ("backbone", "encoder", "decoder"))
    set_checkpointing(model, ())
    assert run_step(model)[1] == run_step(small())[1]


def test_an_unknown_part_is_a_one_line_error() -> None:
    with pytest.raises(ConfigError, match="no part 'encodr'. Did you mean 'encoder'"):
        set_checkpointing(small(), ["encodr"])
