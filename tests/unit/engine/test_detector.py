"""A detector from a checkpoint, whatever that lacks; the first weights of a run from another's."""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Config, ModelConfig, OptimConfig, RunConfig
from engine.commands.first_weights import Start, build_training_model
from engine.detector import load_detector, saved_data_options
from engine.evaluation.evaluate import detect
from models.build import build_model
from models.postprocess import PostProcess
from models.weights.load import load_pretrained
from util.batch import Batch, pad_images
from util.classes import Classes
from util.errors import CheckpointError, ConfigError, UserError

TINY = ModelConfig(
    backbone="resnet18", hidden_dim=32, dim_feedforward=16, enc_layers=1, dec_layers=2,
    num_queries=6,
)  # fmt: skip
CLASSES = Classes((3, 7, 90), ("cat", "dog", "cow"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """What a run saves, as far as others read it."""
    return {
        "model": build_model(TINY, num_classes=3).state_dict(),
        "config": asdict(Config(model=TINY)),
        "classes": CLASSES.to_json(),
        "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5]},
        "thresholds": {"dog": 0.25},
    }


def save(content: dict[str, Any], folder: Path, **changes: Any) -> str:
    """Write a checkpoint with other parts; None leaves one out."""
    changed = {k: v for k, v in {**content, **changes}.items() if v is not None}
    torch.save(changed, folder / "a.pth")
    return str(folder / "a.pth")


def test_a_checkpoint_without_class_names_goes_by_numbers(
    content: dict[str, Any], tmp_path: Path
) -> None:
    source = save(content, tmp_path, classes=None, thresholds=None, preprocessing=None)
    model, pretrained, mean, _ = load_detector(source, CPU)
    assert pretrained.classes == Classes((0, 1, 2), ("", "", ""))
    assert [pretrained.classes.shown(k) for k in range(3)] == ["0", "1", "2"]
    assert all(t.equal(content["model"][k]) for k, t in model.state_dict().items())
    assert mean == model.backbone.mean
    assert not pretrained.thresholds


@pytest.mark.parametrize("section", ["model", "data"])
def test_an_option_of_a_later_version_is_told(
    content: dict[str, Any], tmp_path: Path, section: str
) -> None:
    config = copy.deepcopy(content["config"])
    config[section]["twist"] = 1
    source = save(content, tmp_path, config=config)
    with pytest.raises(CheckpointError, match=rf"a\.pth: unknown option '{section}\.twist'.*later"):
        saved_data_options(load_detector(source, CPU)[1])


def test_options_that_evaluation_does_not_read_may_be_of_a_later_version(
    content: dict[str, Any], tmp_path: Path
) -> None:
    config = copy.deepcopy(content["config"])
    config["optim"]["twist"] = 1
    expected = saved_data_options(load_detector(save(content, tmp_path), CPU)[1])
    source = save(content, tmp_path, config=config)
    assert saved_data_options(load_detector(source, CPU)[1]) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "none"},
        {"config": {"data": {}}},
        {"classes": ["cat", "dog", "cow"]},
        {"classes": {"ids": [3, 3, 7], "names": ["a", "b", "c"]}},
        {"preprocessing": {"mean": [1.0]}},
        {"thresholds": [0.5]},
    ],
    ids=str,
)
def test_parts_of_other_kinds_are_one_line(
    content: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = save(content, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"a\.pth: expected a checkpoint of a run") as caught:
        load_pretrained(source)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_tell_their_backbone(content: dict[str, Any], tmp_path: Path) -> None:
    missing = "backbone.0.body.layer1."
    kept = {k: v for k, v in content["model"].items() if not k.startswith(missing)}
    torch.save(kept, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: expected weights that tell their backbone"):
        load_detector(str(tmp_path / "a.pth"), CPU)
    # for a start the user may say it; what is not said right would stay random
    start = Start(Config(model=TINY), load_pretrained(str(tmp_path / "a.pth")))
    with pytest.raises(CheckpointError, match="--backbone resnet18: expected the backbone of"):
        build_training_model(start, CLASSES)


def test_numbers_that_are_not_finite_are_no_detections(
    content: dict[str, Any], tmp_path: Path
) -> None:
    weights = {key: tensor.clone() for key, tensor in content["model"].items()}
    weights["transformer.decoder.layers.1.linear1.bias"][3] = float("nan")
    model = load_detector(save(content, tmp_path, model=weights), CPU)[0]
    target = {"image_id": torch.tensor(5), "orig_size": torch.tensor([128, 128])}
    batch = Batch(pad_images([torch.rand(3, 128, 128)]), [target], [])
    with pytest.raises(UserError, match="image 5: the model produced NaN or infinite scores"):
        list(detect(model, PostProcess(), [batch], device=CPU, description=""))


@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_another_backbone_keeps_its_own_weights(
    content: dict[str, Any], tmp_path: Path, freeze: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # many tensors of torchvision's resnet34 have the names and shapes of its resnet18
    pretrained = load_pretrained(save(content, tmp_path))
    config = Config(
        model=replace(TINY, backbone="resnet34"),
        run=RunConfig(backbone_weights="none"),
        optim=OptimConfig(freeze=freeze),
    )
    torch.manual_seed(1)
    if freeze == "backbone":
        with pytest.raises(ConfigError, match=r"'backbone\.0\..*' would stay random"):
            build_training_model(Start(config, pretrained), CLASSES)
        return
    model, mean, _ = build_training_model(Start(config, pretrained), CLASSES)
    torch.manual_seed(1)
    untouched = build_model(config.model, num_classes=3).state_dict()
    for name, tensor in model.state_dict().items():
        own = name.startswith("backbone.0.")
        assert tensor.equal(untouched[name] if own else content["model"][name]), name
    assert mean == model.backbone.mean
    assert "that of --finetune is resnet18 and is not taken" in capsys.readouterr().out
