"""Weights from files: which model they hold, which classes, and what is refused."""

import argparse
import copy
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from configs.schema import Config, ModelConfig
from engine.checkpoint import save_checkpoint
from models.build import build_model
from models.weights.class_names import COCO_CATEGORIES, coco_logit_classes
from models.weights.load import load_pretrained
from models.weights.official import (
    complete_heads,
    official_classes,
    official_options,
    save_official,
)
from models.weights.transfer import load_strict
from tests.unit.models.small import built
from util.classes import Classes
from util.errors import CheckpointError

SHARED = Path(__file__).parents[5] / "shared"
KEYS_FILE = SHARED / "reference" / "state_dict_keys.json"
TINY: dict[str, Any] = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "nheads": 8,
    "dim_feedforward": 16,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
    "single_scale": {"num_feature_levels": 1, "position_embedding": "learned"},
    "points": {"enc_n_points": 2, "dec_n_points": 3, "num_feature_levels": 5},
}


def fresh(options: dict[str, Any], num_classes: int = 3) -> tuple[ModelConfig, torch.nn.Module]:
    """Return a tiny model whose tensors all differ."""
    config = ModelConfig(**TINY | options)
    return config, copy.deepcopy(_filled(config, num_classes))


@functools.lru_cache(maxsize=6)
def _filled(config: ModelConfig, num_classes: int) -> torch.nn.Module:
    model = built(config, num_classes)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_options_are_inferred_from_bare_weights(tmp_path: Path, variant: str) -> None:
    config, model = fresh(VARIANTS[variant])
    torch.save(model.state_dict(), tmp_path / "w.pth")
    pretrained = load_pretrained(str(tmp_path / "w.pth"))
    unknown = {"num_queries"} if config.two_stage else set()
    inferred = {"backbone", "num_feature_levels", "enc_layers", "dec_layers", "dim_feedforward"}
    inferred |= {"hidden_dim", "num_queries", "enc_n_points", "dec_n_points", "with_box_refine"}
    inferred |= {"two_stage", "position_embedding"}
    for name in inferred - unknown:
        assert pretrained.model_options[name] == getattr(config, name), name
    assert pretrained.model_options.keys().isdisjoint(unknown | {"dilation", "dropout"})
    assert pretrained.kind == "official"
    assert same(pretrained.state_dict, model.state_dict())


@pytest.mark.long
@pytest.mark.parametrize("variant", ["plain", "refine", "two_stage"])
def test_weights_without_repeated_names_are_completed(tmp_path: Path, variant: str) -> None:
    _, model = fresh(VARIANTS[variant])
    whole = model.state_dict()
    once = {t.data_ptr(): (k, t) for k, t in reversed(whole.items())}  # the first name stays
    kept = {key: tensor for key, tensor in once.values()}
    assert len(kept) < len(whole)
    save_file({k: v.contiguous() for k, v in kept.items()}, tmp_path / "w.safetensors")
    options = {"dec_layers": 2, "with_box_refine": False, "two_stage": False} | VARIANTS[variant]
    assert same(complete_heads(kept, options), whole)
    assert same(load_pretrained(str(tmp_path / "w.safetensors")).state_dict, whole)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_official_file_goes_out_and_comes_back(tmp_path: Path, variant: str) -> None:
    config, model = fresh(VARIANTS[variant])
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    save_official(tmp_path / "o.pth", model.state_dict(), options=values, epoch=49)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "o.pth", weights_only=True)
    assert content.keys() == {"model", "args", "epoch"}
    torch.save({**content, "config": {"lr": 1e-4}}, tmp_path / "o.pth")  # as forks add
    pretrained = load_pretrained(str(tmp_path / "o.pth"))
    assert ModelConfig(**pretrained.model_options) == config
    other = built(config, 3)
    load_strict(other, pretrained.state_dict, "file")
    assert same(other.state_dict(), model.state_dict())


def test_official_file_needs_a_resnet(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="timm/x"):
        save_official(tmp_path / "o.pth", {}, options={"backbone": "timm/x"}, epoch=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not KEYS_FILE.is_file(), reason="needs the recorded official keys")
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("plain", {}),
        ("refine", {"with_box_refine": True}),
        ("refine_two_stage", {"with_box_refine": True, "two_stage": True}),
        ("single_scale", {"num_feature_levels": 1}),
        ("single_scale_dc5", {"num_feature_levels": 1, "dilation": True}),
    ],
)
def test_published_models_are_recognised(variant: str, expected: dict[str, Any]) -> None:
    shapes = json.loads(KEYS_FILE.read_text())[variant]
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes}
    for key, shape in shapes:  # values of these decide whether heads are shared
        if key.startswith("bbox_embed"):
            weights[key] = torch.zeros(shape)
    args = argparse.Namespace(
        **{"dilation": variant.endswith("dc5"), "lr_backbone": 2e-5, "masks": False},
        **{"nheads": 8, "num_queries": 300, "position_embedding": "sine", "dropout": 0.1},
        **{"position_embedding_scale": 2 * math.pi, "backbone": "resnet50", "aux_loss": True},
    )
    options = official_options(weights, args, "r50.pth")
    assert ModelConfig(**options) == ModelConfig(**expected)
    classes = official_classes(weights)
    assert classes == coco_logit_classes()
    assert {i: n for i, n in zip(classes.ids, classes.names, strict=True) if n} == COCO_CATEGORIES
    assert complete_heads(weights, options).keys() == weights.keys()


@pytest.mark.skipif(
    not (SHARED / "datasets/coco_by").is_dir(), reason="needs the COCO sample beside the project"
)
def test_coco_names_are_those_of_its_files() -> None:
    file = next((SHARED / "datasets/coco_by/annotations").glob("instances_*.json"))
    categories = json.loads(file.read_text())["categories"]
    assert {c["id"]: c["name"] for c in categories} == COCO_CATEGORIES


def checkpoint_of_ours(path: Path, model: nn.Module, **parts: Any) -> None:
    """Write what a run saves."""
    content = {"optimizer": {}, "lr_scheduler": {}, "epoch": 3, "progress": {}, "best": {}}
    content |= {"model": model.state_dict(), "versions": {}, **parts}
    content |= {"preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5]}}
    save_checkpoint(path, content)


def test_our_checkpoint_brings_everything(tmp_path: Path) -> None:
    config, model = fresh({})
    classes = Classes((3, 7, 90), ("cat", "dog", "cow"))
    sections = {"model": dict(vars(config)), "data": {"max_size": 640}}
    checkpoint_of_ours(tmp_path / "best.pth", model, classes=classes.to_json(), config=sections)
    pretrained = load_pretrained(str(tmp_path / "best.pth"))
    assert pretrained.kind == "ours"
    assert pretrained.classes == classes
    assert pretrained.image_mean == (0.5, 0.4, 0.3)
    assert pretrained.config == sections
    assert ModelConfig(**pretrained.model_options) == config == Config(model=config).model
    assert same(pretrained.state_dict, model.state_dict())


@pytest.mark.long
def test_the_documented_export_code_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[4] / "docs" / "python.md").read_text(encoding="utf-8")
    (lines,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "save_official" in b]
    lines = lines.replace("deformable_detr.models", "models").replace("deformable_detr", "engine")
    config, model = fresh({})
    classes = Classes((3, 7, 90), ("cat", "dog", "cow"))
    sections = {"model": dict(vars(config)), "data": {"eval_scale": 480, "max_size": 640}}
    monkeypatch.chdir(tmp_path)
    checkpoint_of_ours(
        Path("runs/mine/best.pth"), model, classes=classes.to_json(), config=sections
    )
    exec(lines, {})
    official, theirs = (load_pretrained(name) for name in ("official.pth", "for_transformers"))
    for saved in (official, theirs):
        assert same(saved.state_dict, model.state_dict())
        assert build_model(ModelConfig(**saved.model_options), num_classes=3)
    assert theirs.classes.names == classes.names
    assert theirs.image_mean == (0.5, 0.4, 0.3)
    assert theirs.image_size == (480, 640)


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda s: {"model": under("module.", s)}, "'model', keys without 'module.'"),
        (lambda s: {"state_dict": under("model.", s), "epoch": 3},
         "'state_dict', keys without 'model.'"),
        (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s}, "'model_ema'"),
        (lambda s: {"ema": {"module": s, "updates": 7}}, "'ema.module'"),
        (lambda s: {"model": s}, ""),
        (lambda s: s, ""),
    ],
)  # fmt: skip
def test_wrapped_weights_are_found_and_reported(
    wrap: Any, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, model = fresh({})
    torch.save(wrap(dict(model.state_dict())), tmp_path / "w.pth")
    assert same(load_pretrained(str(tmp_path / "w.pth")).state_dict, model.state_dict())
    printed = capsys.readouterr().out.splitlines()
    said = [line.partition("found in it: ")[2] for line in printed]
    assert said == ([place] if place else [])


def test_without_averages_the_trained_copy_is_taken(tmp_path: Path) -> None:
    _, model = fresh({})
    state = dict(model.state_dict())
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "w.pth")
    trained = load_pretrained(str(tmp_path / "w.pth"), ema=False)
    assert same(trained.state_dict, state)


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"fc.weight": torch.ones(2)}, "not weights of Deformable DETR"),
        ({"model": {"transformer.encoder.layers.0.norm1.bias": torch.ones(2)}}, "Other models"),
        (
            {"state_dict": {"module.layer1.0.conv1.weight": torch.ones(2)}},
            r"Keys found: 'module.layer1.0.conv1.weight'; expected: 'transformer.level_embed', .* "
            "A backbone alone is given as `backbone_weights`",
        ),
        ([1, 2], "holds a list"),
        ({"weights": {"a": 1}}, "its keys are 'weights'"),
        ({}, r"\(none\)"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, what: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=what) as caught:
        load_pretrained(str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)


def test_options_we_lack_are_refused() -> None:
    _, model = fresh({})
    args = argparse.Namespace(position_embedding_scale=10.0)
    with pytest.raises(CheckpointError, match="position_embedding_scale"):
        official_options(model.state_dict(), args, "x.pth")


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_pretrained(str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match=r"best\.pth or last\.pth"):
        load_pretrained(str(tmp_path))
