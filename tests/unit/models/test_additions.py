"""Each part of a detector that is chosen by name: a new file and one line add another."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import models
import models.backbones.registry
import models.encoders
import models.necks
import models.recipes
from configs.schema import LossConfig
from models.build import build_criterion, build_model
from models.losses import LOSSES
from models.matcher import pad_targets
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import group_of, random_images, small_config, small_model
from util.batch import pad_images
from util.errors import ConfigError
from util.registry import Registry

BACKBONE = '''
"""A backbone of three strided convolutions."""

from torch import nn

from models.backbones.registry import BACKBONES


class Strided(nn.Module):
    channels, strides = (8, 16, 32), (8, 16, 32)
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    checkpointing = False

    def __init__(self, options):
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 16, 2, 2), nn.Conv2d(16, 32, 2, 2)]
        )

    def forward(self, images):
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


BACKBONES.register("strided")(Strided)
'''
ENCODER = '''
"""An encoder layer that looks at its own token alone."""

from torch import nn

from models.encoders import ENCODERS, Encoder


@ENCODERS.register("pointwise")
class Pointwise(Encoder):
    def __init__(self, options):
        super().__init__()
        width = options.d_model
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(options.num_layers))

    def forward(self, levels):
        x = levels.tokens
        for layer in self.layers:
            x = x + layer(x + levels.pos).relu()
        return x
'''
NECK = '''
"""A neck that adds what lies above, from coarse to fine."""

import torch.nn.functional as F
from torch import nn

from models.necks import NECKS


@NECKS.register("top_down")
class TopDown(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.smooth = nn.ModuleList(
            nn.Conv2d(options.d_model, options.d_model, 3, padding=1)
            for _ in range(options.num_levels)
        )

    def forward(self, maps):
        for i in range(len(maps) - 1, 0, -1):
            finer = maps[i - 1]
            maps[i - 1] = finer + F.interpolate(maps[i], size=finer.shape[2:])
        return [smooth(m) for smooth, m in zip(self.smooth, maps)]
'''
RECIPE = '''
"""The targets themselves as queries, which find them again."""

from dataclasses import dataclass

from torch import nn

from configs.options import Checked, option
from models.recipes import RECIPES
from models.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    echo_queries: int = option(2, "how many", low=1)


@RECIPES.register("echo")
class Echo(Recipe):
    options_class = Options

    def __init__(self, options, transformer, *, num_classes):
        super().__init__(options, transformer, num_classes=num_classes)
        self.embed = nn.Embedding(options.echo_queries, 2 * transformer.d_model)

    def queries(self, transformer, memory, proposals, targets):
        return [transformer.from_embedding("_echo", self.embed.weight, len(memory))]
'''
LOSS = '''
"""A loss of the size of boxes, whatever their place."""

from models.losses import register_loss


@register_loss("loss_size", coefficient=0.5)
def size(assigned):
    return (assigned.matched_boxes - assigned.target_boxes)[..., 2:].abs().sum((1, 2))
'''


Add = Callable[[ModuleType, Registry[Any], str, str], None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Return what adds a file to a package, and the one line of its registration."""

    def add_file(package: ModuleType, registry: Registry[Any], name: str, text: str) -> None:
        (tmp_path / f"added_{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        monkeypatch.setitem(registry.modules, name, f".added_{name}")
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    return add_file


BATCH = [(64, 96), (50, 70)]


def step(**options: Any) -> dict[str, torch.Tensor]:
    """Return the losses of a training step, in which every parameter learns."""
    model = small_model(**options).train()
    targets = random_targets([2, 1], 5)
    losses = build_criterion(LossConfig())(model(pad_images(random_images(*BATCH))), targets)
    torch.autograd.backward(losses["loss"])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return losses


def test_a_backbone(add: Add) -> None:
    add(models.backbones, models.backbones.registry.BACKBONES, "strided", BACKBONE)
    assert step(backbone="strided/small")["loss"].isfinite()


def test_an_encoder_layer(add: Add) -> None:
    add(models.encoders, models.encoders.ENCODERS, "pointwise", ENCODER)
    model = small_model(encoder="pointwise")
    assert "transformer.encoder.layers.1.weight" in model.state_dict()
    assert step(encoder="pointwise")["loss"].isfinite()


def test_a_neck(add: Add) -> None:
    add(models.necks, models.necks.NECKS, "top_down", NECK)
    assert "neck.smooth.3.weight" in small_model(neck="top_down").state_dict()
    assert step(neck="top_down")["loss"].isfinite()
    assert not any(key.startswith("neck") for key in small_model().state_dict())


def test_a_recipe(add: Add) -> None:
    add(models.recipes, models.recipes.RECIPES, "echo", RECIPE)
    options = models.recipes.RECIPES["echo"].options_class(echo_queries=3)
    model = build_model(small_config(), num_classes=5, recipes={"echo": options}).double().train()
    targets = random_targets([2, 1], 5)
    outputs = model(pad_images(random_images(*BATCH)), targets)
    assert group_of(outputs, "_echo").logits.shape[2] == 3
    losses = build_criterion(LossConfig())(outputs, targets)
    assert "loss_giou_echo_1" in losses
    torch.autograd.backward(losses["loss"])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_loss(add: Add) -> None:
    add(models, LOSSES, "loss_size", LOSS)
    targets = random_targets([2, 1], 5)
    outputs = small_model()(pad_images(random_images(*BATCH)))
    plain = build_criterion(LossConfig())(outputs, targets)
    assert "loss_size" not in plain
    default = build_criterion(LossConfig(extra_losses=("loss_size",)))
    criterion = build_criterion(LossConfig(extra_losses=("loss_size=3",)))
    assert (default.weight("loss_size_1"), criterion.weight("loss_size_1")) == (0.5, 3)
    losses = criterion(outputs, targets)
    padded = pad_targets(targets, torch.device("cpu"))
    group = group_of(outputs)
    (matches,) = criterion.matcher([(group.logits, group.boxes, padded)])
    total = plain["loss"]
    for layer, suffix in enumerate(("_0", "_1", "")):
        pairs = zip(matches.image, matches.query[layer], matches.target[layer], strict=True)
        off = [group.boxes[layer, i, q] - targets[i]["boxes"][t] for i, q, t in pairs]
        expected = torch.stack([o[2:].abs().sum() for o in off]).sum() / 3
        torch.testing.assert_close(losses[f"loss_size{suffix}"], expected)
        total = total + 3 * expected
    torch.testing.assert_close(losses["loss"], total)


def test_an_unknown_name_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"neck non: does not exist. Did you mean 'none'\?"):
        small_model(neck="non")
    with pytest.raises(ConfigError, match=r"encoder dense: does not exist. Known: deformable."):
        small_model(encoder="dense")
    with pytest.raises(ConfigError, match=r"loss loss_gio: does not exist. Did you mean"):
        build_criterion(LossConfig(extra_losses=("loss_gio",)))
    with pytest.raises(ConfigError, match=r"'loss_ce=much' has no number after '='"):
        build_criterion(LossConfig(extra_losses=("loss_ce=much",)))
    with pytest.raises(ConfigError, match="recipe one_to_may: does not exist. Did you mean"):
        build_model(small_config(), num_classes=5, recipes={"one_to_may": None})
