"""detectron2's ResNets: what is torchvision's network is read, what is Caffe's is refused."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from models.backbones import create_backbone
from models.weights.load import load_pretrained
from util.errors import CheckpointError


def network(variant: str) -> dict[str, Tensor]:
    """Return torchvision's weights, with norms that have seen images."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = torchvision.models.get_model(variant).state_dict()
    return {
        key: torch.rand(t.shape, generator=generator) + 0.5 if "running" in key else t
        for key, t in state.items()
    }


def as_detectron2(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the weights as detectron2's own script for torchvision's names them."""
    renamed = {}
    for key, tensor in state.items():
        if "num_batches" in key:
            continue
        name = key if "layer" in key else f"stem.{key}"
        for stage in (1, 2, 3, 4):
            name = name.replace(f"layer{stage}", f"res{stage + 1}")
        for number in (1, 2, 3):
            name = name.replace(f"bn{number}", f"conv{number}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name] = tensor.numpy()
    return renamed


def save(path: Path, weights: dict[str, Any], author: str | None = "torchvision") -> str:
    content = {"model": weights, "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content | ({"__author__": author} if author else {})))
    return str(path)


@pytest.mark.long
@pytest.mark.parametrize("variant", ["resnet18", "resnet50"])
@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_torchvisions_network_is_read_to_the_bit(
    tmp_path: Path, variant: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = network(variant)
    weights = {prefix + key: array for key, array in as_detectron2(state).items()}
    weights["proposal_generator.weight"] = np.ones(3, dtype=np.float32)
    backbone = create_backbone(variant, weights=save(tmp_path / "w.pkl", weights))
    assert isinstance(backbone, torch.nn.Module)
    loaded = backbone.state_dict()
    compared = [k for k in state if not k.startswith("fc.") and "num_batches" not in k]
    assert len(compared) == len(loaded)
    for key in compared:
        assert torch.equal(loaded[f"body.{key}"], state[key]), key
    assert "under detectron2's names by 'torchvision'" in capsys.readouterr().out


def test_torch_files_with_these_names_are_read_too(tmp_path: Path) -> None:
    state = network("resnet18")
    weights = {key: torch.from_numpy(array) for key, array in as_detectron2(state).items()}
    torch.save({"model": weights, "iteration": 9}, tmp_path / "model_final.pth")
    backbone = create_backbone("resnet18", weights=str(tmp_path / "model_final.pth"))
    assert isinstance(backbone, torch.nn.Module)
    assert torch.equal(backbone.state_dict()["body.conv1.weight"], state["conv1.weight"])


@pytest.mark.long
def test_caffes_networks_are_refused_with_the_reason(tmp_path: Path) -> None:
    weights = as_detectron2(network("resnet18"))
    plain = dict(weights)
    plain["stem.conv1.norm.running_mean"] = np.zeros(64, dtype=np.float32)
    plain["stem.conv1.norm.running_var"] = np.full(64, 1 - 1e-5, dtype=np.float32)
    caffe2 = {"conv1_w": np.ones(3), "res2_0_branch2a_w": np.ones(3)}
    (tmp_path / "blobs.pkl").write_bytes(pickle.dumps({"blobs": caffe2}, protocol=2))
    files = {
        save(tmp_path / "zoo.pkl", weights, "Detectron2 Model Zoo"): "by 'Detectron2 Model Zoo'",
        save(tmp_path / "plain.pkl", plain, None): "means of 0 and variances of 1",
        str(tmp_path / "blobs.pkl"): "names of its weights are Caffe2's",
    }
    for file, why in files.items():
        with pytest.raises(CheckpointError, match="ResNet of Caffe's kind.*BGR") as caught:
            create_backbone("resnet18", weights=file)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)


def test_another_size_of_the_network_is_an_error_of_one_line(tmp_path: Path) -> None:
    file = save(tmp_path / "w.pkl", as_detectron2(network("resnet18")))
    with pytest.raises(CheckpointError, match="does not hold torchvision's resnet50"):
        create_backbone("resnet50", weights=file)


def test_a_backbone_is_no_detector(tmp_path: Path) -> None:
    file = save(tmp_path / "w.pkl", as_detectron2(network("resnet18")))
    with pytest.raises(CheckpointError, match="A backbone alone is given as `backbone_weights`"):
        load_pretrained(file)
