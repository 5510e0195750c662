"""The installed package: one name, nothing of others' taken, and all of it works from anywhere."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from configs.schema import ModelConfig
from engine.commands import COMMANDS
from models.build import build_model
from models.weights.official import save_official
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.slow

# What a stranger's program has around the package, and the README's lines on one image.
USE = """
import sys
import deformable_detr
assert "torch" not in sys.modules, "importing the package loads PyTorch"
assert set(dir(deformable_detr)) >= {"Box", "Detector", "UserError", "evaluate", "train"}
import transformers
assert not transformers.utils.is_datasets_available() or "site-packages" in (
    __import__("datasets").__file__
)
for room in ("configs", "engine", "models", "ops", "util", "main"):
    try:
        __import__(room)
    except ImportError:
        continue
    raise AssertionError(f"the package takes the name {room}")

from deformable_detr import Detector
detector = Detector.load("official.pth", eval_scale=64)
for box in detector.predict("photo.jpg"):
    print(box.name, box.score, box.xyxy)
"""

IMPORT_ALL = """
import importlib, pkgutil
import deformable_detr
for module in pkgutil.walk_packages(deformable_detr.__path__, "deformable_detr."):
    if not module.name.endswith(("triton_kernels", "__main__")):  # needs Triton; runs
        try:
            importlib.import_module(module.name)
        except Exception as error:
            if "Install it: pip install" not in str(error):  # what only an option needs
                raise
        print(module.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of what git tracks or would track."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/unit", "docs/")):
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    run_pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "tree")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install it, without what it requires, into an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    run_pip("install", "--target", folder, wheel)
    return folder


def run_pip(command: str, *arguments: str | Path) -> None:
    """Run pip without a network or dependencies."""
    fixed = ["--no-index", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *fixed, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def run(installed: Path, folder: Path, *arguments: str | Path) -> str:
    """Run Python, or a script, in a folder as one who has installed the package; return stdout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_one_package_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == "deformable_detr-0.1.0-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {
        "deformable_detr", "deformable_detr-0.1.0.dist-info"
    }  # fmt: skip
    tracked = subprocess.run(
        ["git", "ls-files", "configs", "datasets", "engine", "models", "ops", "util"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = {
        f"deformable_detr/{name}" for name in tracked.stdout.split()
        if (ROOT / name).exists() and name not in ("ops/README.md", "ops/pyproject.toml")
    }  # fmt: skip
    generated = {f"deformable_detr/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    present = {name for name in names if name.startswith("deformable_detr/")}
    assert present == expected | generated | {"deformable_detr/main.py"}


def test_detects_in_an_image_and_leaves_the_names_of_others_free(
    installed: Path, tmp_path: Path, shapes: Path
) -> None:
    options: dict[str, Any] = {
        "backbone": "resnet18", "hidden_dim": 32, "nheads": 2, "enc_layers": 1, "dec_layers": 1,
        "dim_feedforward": 32, "num_queries": 5,
    }  # fmt: skip
    model = build_model(ModelConfig(**options), num_classes=91)
    head = model.class_embed[0]
    assert isinstance(head, nn.Linear)
    head.bias.data[18] = 4.0  # every query finds a dog, COCO's category 18
    save_official(tmp_path / "official.pth", model.state_dict(), options=options, epoch=49)
    photo = sorted((shapes / "val2017").iterdir())[0]
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    lines = run(installed, tmp_path, "-c", USE).splitlines()
    assert [line.split()[0] for line in lines] == ["dog"] * 5


def test_the_console_script_trains_and_the_modules_run(installed: Path, tmp_path: Path) -> None:
    made = run(
        installed, tmp_path, "-m", "deformable_detr.datasets.shapes",
        "--output_dir", "shapes", "--num_train", "8", "--num_val", "2",
    )  # fmt: skip
    assert "8 training" in made
    script = installed / "bin" / "deformable-detr"
    run(
        installed, tmp_path, script, "train", "--config", "shapes_tiny", "--coco_path", "shapes",
        "--output_dir", "run", "--batch_size", "2", "--max_steps", "2", "--num_workers", "1",
        "--device", "cpu", "--gpus", "2",
    )  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [step["step"] for step in steps] == [0, 1]
    assert "usage: deformable-detr eval" in run(installed, tmp_path, script, "eval", "--help")
    run(
        installed, tmp_path, "-m", "deformable_detr", "predict", "--checkpoint", "run/last.pth",
        "--input", "shapes/val2017", "--output_dir", "found", "--device", "cpu",
    )  # fmt: skip
    assert (tmp_path / "found" / "predictions.json").is_file()
    by_path = installed / "deformable_detr" / "__main__.py"  # as a launcher starts `-m` again
    assert "usage: deformable-detr" in run(installed, tmp_path, by_path, "--help")


def test_every_module_imports_under_its_new_name(installed: Path, tmp_path: Path) -> None:
    found = run(installed, tmp_path, "-c", IMPORT_ALL).split()
    assert {f"deformable_detr.engine.commands.{name}" for name in COMMANDS} <= set(found)
    assert len(found) > 100
