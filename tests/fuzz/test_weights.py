"""Checkpoints and descriptions of models, nearly sound: read, or refused in one line."""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from configs.schema import Config
from engine.checkpoint import load_checkpoint
from engine.detector import Detector
from engine.trainer import Trainer
from models.backbones import create_backbone
from models.build import build_model
from models.weights.folder import DESCRIPTION, write_folder
from models.weights.hugging_face import save_hugging_face
from models.weights.load import load_pretrained
from tests.fuzz.mutations import (
    EXAMPLES,
    ODD_TENSORS,
    ODD_VALUES,
    exchanged,
    fuzzed,
    mutated,
    only_refused,
)
from tests.unit.models.small import small_config
from util.classes import Classes


@fuzzed
@given(data=st.data())
def test_bytes_of_checkpoints(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.pth"
    content = {"model": {"w": torch.arange(6.0)}, "epoch": 3, "optimizer": [1, "x", (None, 2.5)]}
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(data.draw(mutated([path.read_bytes()])))
        with only_refused():
            load_checkpoint(path)
        with only_refused():
            load_pretrained(str(path))


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each restores a whole run
@given(data=st.data())
def test_values_of_checkpoints(trainer: Trainer, data: st.DataObject) -> None:
    sound = load_checkpoint(trainer.checkpoints.last)
    content = data.draw(exchanged(sound, [*ODD_VALUES, *ODD_TENSORS]))
    with only_refused():
        # what `load_checkpoint` looks at
        if all(isinstance(content.get(key), dict) for key in ("model", "optimizer", "lr_scheduler",
                                                              "progress")):  # fmt: skip
            trainer.load_state_dict({"scaler": {}, "ema": {}, "best": {}, **content})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run saves of a small detector, without the state of its optimiser."""
    options = small_config(backbone="timm/test_resnet", hidden_dim=32, nheads=2)
    model = build_model(options, num_classes=3)
    return {
        "model": model.state_dict(),
        "classes": Classes((1, 2, 5), ("a", "b", "c")).to_json(),
        "config": asdict(Config(model=options)),
        "preprocessing": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        "thresholds": {"a": 0.4},
        "ema": {"model": model.state_dict(), "count": 5},
    }


CLAIMS = (
    *ODD_VALUES, 6, 100, 8192, 65536, 100000, "resnet101", "timm/vit_base_patch16_224", "encoder"
)  # fmt: skip


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each builds a model
@given(data=st.data())
def test_whole_models(tmp_path: Path, whole: dict[str, Any], data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(("all", "config", "model", "others")))
    content = dict(whole)
    if part == "config":
        chosen = {"model": content["config"]["model"]}
        content["config"] = {**content["config"], **data.draw(exchanged(chosen, CLAIMS))}
    elif part == "model":
        content["model"] = data.draw(exchanged(content["model"], ODD_TENSORS))
        del content["ema"]
    elif part == "others":
        others = {k: content[k] for k in ("classes", "preprocessing", "thresholds", "config")}
        content |= data.draw(exchanged(others, ODD_VALUES))
    else:
        content = data.draw(exchanged(content, [*ODD_VALUES, *ODD_TENSORS]))
    torch.save(content, tmp_path / "x.pth")
    with only_refused():
        Detector.load(tmp_path / "x.pth", device="cpu")


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each builds a model
@given(data=st.data())
def test_state_dicts_of_others(tmp_path: Path, whole: dict[str, Any], data: st.DataObject) -> None:
    tensors = dict(whole["model"])
    for key in data.draw(
        st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)
    ):
        kind = data.draw(st.sampled_from(("remove", "other", "cut", "rename", "deep")))
        tensor = tensors.pop(key)
        if kind == "other":
            tensors[key] = data.draw(st.sampled_from(ODD_TENSORS))
        elif kind == "cut":
            tensors[key] = tensor.flatten()[: data.draw(st.integers(0, 3))].clone()
        elif kind == "rename":
            tensors[
                key.replace(".0.", f".{data.draw(st.sampled_from((7, 10**9, '9' * 5000)))}.")
            ] = tensor
        elif kind == "deep":
            tensors["module." * data.draw(st.integers(1, 500)) + key] = tensor
    names = {"backbone": "timm/test_resnet", "nheads": 2, "hidden_dim": 32}
    args = argparse.Namespace(**data.draw(exchanged(names, CLAIMS)))
    content = data.draw(st.sampled_from((tensors, {"model": tensors, "args": args})))
    torch.save(content, tmp_path / "x.pth")
    with only_refused():
        Detector.load(tmp_path / "x.pth", device="cpu")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("hf")
    options = small_config(backbone="resnet18", hidden_dim=32, nheads=2)
    save_hugging_face(
        folder,
        build_model(options, num_classes=3).state_dict(),
        options=asdict(options),
        classes=Classes((0, 1, 2), ("a", "b", "c")),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.2, 0.2, 0.2),
        image_size=(64, 96),
    )
    return folder


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each builds a model
@given(data=st.data())
def test_hugging_face_folders(tmp_path: Path, hugging_face: Path, data: st.DataObject) -> None:
    shutil.copytree(hugging_face, tmp_path / "hf", dirs_exist_ok=True)
    name = data.draw(st.sampled_from(("config.json", "preprocessor_config.json")))
    sound = json.loads((hugging_face / name).read_text())
    values = [value for value in CLAIMS if value != 10**5000]
    if data.draw(st.booleans()):
        content = json.dumps(data.draw(exchanged(sound, values))).encode()
    else:
        content = data.draw(mutated([json.dumps(sound).encode()]))
    (tmp_path / "hf" / name).write_bytes(content)
    with only_refused():
        Detector.load(tmp_path / "hf", device="cpu")


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each builds a model
@given(data=st.data())
def test_folders_of_our_own(
    tmp_path: Path, whole: dict[str, Any], hugging_face: Path, data: st.DataObject
) -> None:
    described = {key: whole[key] for key in ("classes", "config", "preprocessing", "thresholds")}
    described["config"] = dict(described["config"])
    folder = tmp_path / "folder"
    if data.draw(st.booleans()):
        write_folder(folder, whole["model"], {})
    else:  # for transformers, too
        shutil.copytree(hugging_face, folder, dirs_exist_ok=True)
        described["config"].pop("model")
    values = [value for value in CLAIMS if value != 10**5000]
    if data.draw(st.booleans()):
        content = json.dumps(data.draw(exchanged(described, values))).encode()
    else:
        content = data.draw(mutated([json.dumps(described).encode()]))
    (folder / DESCRIPTION).write_bytes(content)
    with only_refused():
        Detector.load(folder, device="cpu")


@fuzzed
@given(data=st.data())
def test_safetensors(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a.b": torch.arange(6.0), "c": torch.zeros(2, 3)}, path)
    path.write_bytes(data.draw(mutated([path.read_bytes()])))
    with only_refused():
        load_pretrained(str(path))


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each builds a network
@given(data=st.data())
def test_weights_of_backbones(tmp_path: Path, data: st.DataObject) -> None:
    body = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64),
            "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}  # fmt: skip
    wrapped = {"state_dict": {f"module.{key}": tensor for key, tensor in body.items()}, "epoch": 3}
    content = data.draw(exchanged(wrapped, [*ODD_VALUES, *ODD_TENSORS]))
    torch.save(content, tmp_path / "x.pth")
    with only_refused():
        create_backbone("resnet18", weights=str(tmp_path / "x.pth"))
