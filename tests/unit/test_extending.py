"""The files that docs/extending.md shows: each adds something, with one line of registration."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import datasets.formats
import models
import models.backbones
import models.encoders
import models.necks
import models.recipes
from configs.schema import DataConfig, LossConfig
from datasets.build import load_index
from datasets.formats.registry import FORMATS
from main import main
from models.backbones import BACKBONES
from models.build import build_criterion, build_model
from models.encoders.attention import ATTENTIONS
from models.losses import LOSSES
from models.matcher import pad_targets
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import group_of, random_images, small_config, small_model
from util.batch import pad_images
from util.errors import ConfigError
from util.registry import Registry

DOCUMENT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```$", DOCUMENT, re.M | re.S))


Add = Callable[[ModuleType, Registry[Any], str, str], None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Return what adds a file to a package, and the one line of its registration."""

    def add_file(package: ModuleType, registry: Registry[Any], name: str, file: str) -> None:
        folder = tmp_path / Path(file).parent
        folder.mkdir(parents=True)
        (tmp_path / file).write_text(FILES[file])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(
            sys.modules, f"{package.__name__}.{Path(file).stem}", raising=False
        )  # an earlier test's
        line = f'`"{name}": ".{Path(file).stem}"`'
        assert line in DOCUMENT
        monkeypatch.setitem(registry.modules, name, f".{Path(file).stem}")
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    return add_file


LINES = re.findall(r"^The line: `.+?` in `(\w+)` of `([\w/]+\.py)`", DOCUMENT, re.M)
assert len(LINES) == 7, "each example says where its line goes"


@pytest.mark.parametrize(("table", "file"), LINES)
def test_a_line_can_be_added_where_the_document_says(table: str, file: str) -> None:
    tree = ast.parse((Path(__file__).parents[2] / file).read_text(encoding="utf-8"))
    tables = [
        part
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table
        for part in ast.walk(node)
        if isinstance(part, ast.Dict)
    ]
    assert len(tables) == 1, "a table of names and modules, written out"


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
    add(
        models.backbones,
        BACKBONES,
        "strided",
        "models/backbones/strided.py",
    )
    assert step(backbone="strided/small")["loss"].isfinite()


def test_an_encoder_layer(add: Add) -> None:
    add(models.encoders, models.encoders.ENCODERS, "pointwise", "models/encoders/pointwise.py")
    model = small_model(encoder="pointwise")
    assert "transformer.encoder.layers.1.weight" in model.state_dict()
    assert step(encoder="pointwise")["loss"].isfinite()


def test_an_encoder_s_attention(add: Add) -> None:
    add(models.encoders, ATTENTIONS, "average", "models/encoders/average.py")
    for given in ("average", "average+deformable"):
        assert step(encoder_attn=given)["loss"].isfinite()


def test_a_neck(add: Add) -> None:
    add(models.necks, models.necks.NECKS, "top_down", "models/necks/top_down.py")
    assert "neck.smooth.3.weight" in small_model(neck="top_down").state_dict()
    assert step(neck="top_down")["loss"].isfinite()
    assert not any(key.startswith("neck") for key in small_model().state_dict())


@pytest.mark.parametrize(
    "switches", [(), ("two_stage",), ("two_stage", "mixed_query_selection")], ids="+".join
)
def test_a_recipe(add: Add, switches: tuple[str, ...]) -> None:
    add(models.recipes, models.recipes.RECIPES, "echo", "models/recipes/echo.py")
    options = models.recipes.RECIPES["echo"].options_class(echo_queries=3)
    config = small_config(with_box_refine=True, **dict.fromkeys(switches, True))
    model = build_model(config, num_classes=5, recipes={"echo": options}).double().train()
    targets = random_targets([2, 1], 5)
    outputs = model(pad_images(random_images(*BATCH)), targets)
    assert group_of(outputs, "_echo").logits.shape[2] == 3
    losses = build_criterion(LossConfig())(outputs, targets)
    assert "loss_giou_echo_1" in losses
    torch.autograd.backward(losses["loss"])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_loss(add: Add) -> None:
    add(models, LOSSES, "loss_size", "models/box_size.py")
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


def test_a_data_format(
    add: Add, content: dict[str, Any], write: Callable[[dict[str, Any]], tuple[Path, Path]],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    add(datasets.formats, FORMATS, "tsv", "datasets/formats/tsv.py")
    json_path, images = write(content)
    there = ["--to", "tsv", "--output_dir", str(tmp_path / "table"), "--splits", "train"]
    source = ["--from", "coco", "--data_path", str(json_path), "--images", str(images)]
    assert main(["convert", *source, *there]) == 0
    assert "classes and crowds are lost" in capsys.readouterr().out
    config = DataConfig(data_format="tsv", data_path=str(tmp_path / "table"))
    found = load_index(config, "train").annotations.xywh.tolist()
    assert "valid area or iscrowd" not in capsys.readouterr().out
    expected = [tuple(map(float, entry["bbox"])) for entry in content["annotations"]]
    assert sorted(map(tuple, found)) == sorted(expected)


def test_an_unknown_name_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"neck non: does not exist. Did you mean 'none'\?"):
        small_model(neck="non")
    with pytest.raises(ConfigError, match=r"encoder dense: does not exist. Known: deformable."):
        small_model(encoder="dense")
    with pytest.raises(ConfigError, match=r"loss loss_gio: does not exist. Did you mean"):
        build_criterion(LossConfig(extra_losses=("loss_gio",)))
    with pytest.raises(ConfigError, match=r"'loss_giou=much' has no number after '='"):
        build_criterion(LossConfig(extra_losses=("loss_giou=much",)))
    with pytest.raises(ConfigError, match="recipe hybird: does not exist. Did you mean"):
        build_model(small_config(), num_classes=5, recipes={"hybird": None})
