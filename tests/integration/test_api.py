"""Python's functions give what the command line gives, to the last digit."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import Box, Detector, UserError, evaluate, train
from main import main
from tests.integration.conftest import ROOT, TINY
from tests.integration.runs import assert_same_runs
from util.errors import ConfigError


def test_predictions_are_those_of_the_command_line(
    finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    assert main(["predict", "--checkpoint", str(finished_run / "last.pth"), "--output_dir",
                 str(tmp_path), "--input", str(shapes / "val2017")]) == 0  # fmt: skip
    written = json.loads((tmp_path / "predictions.json").read_text())
    detector = Detector.load(finished_run / "last.pth")
    paths = sorted((shapes / "val2017").iterdir())
    expected: list[list[Box]] = [[] for _ in paths]
    for entry in written:
        assert entry["file_name"] == paths[entry["image_id"]].name
        x, y, width, height = entry["bbox"]
        expected[entry["image_id"]].append(
            Box(entry["category_name"], entry["category_id"], entry["score"],
                (x, y, x + width, y + height))
        )  # fmt: skip
    found = detector.predict(paths, threshold=0)
    assert [len(boxes) for boxes in found] == [100] * 7
    for boxes, others in zip(found, expected, strict=True):
        for box, other in zip(boxes, others, strict=True):
            assert (box.name, box.category_id, box.score) == (
                other.name, other.category_id, other.score
            )  # fmt: skip
            x0, y0, x1, y1 = box.xyxy
            assert (x0, y0) == other.xyxy[:2]
            assert (x0 + (x1 - x0), y0 + (y1 - y0)) == other.xyxy[2:]


def test_evaluation_is_that_of_the_command_line(
    finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    checkpoint = str(finished_run / "last.pth")
    assert main(["eval", "--checkpoint", checkpoint, "--output_dir", str(tmp_path)]) == 0
    stats = json.loads((tmp_path / "eval" / "results.json").read_text())["stats"]
    expected = {name: math.nan if value is None else value for name, value in stats.items()}
    found = evaluate(finished_run / "last.pth", device="cpu")
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert len(found) == 12
    truth = shapes / "annotations" / "instances_val2017.json"
    detector = Detector.load(finished_run / "last.pth")
    again = detector.evaluate(images=shapes / "val2017", annotations=truth, batch_size=1)
    assert again == pytest.approx(found, rel=0, abs=1e-3, nan_ok=True)


def test_training_is_that_of_the_command_line(
    finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    folder = train(Path(TINY), coco_path=shapes, output_dir=tmp_path / "run")
    assert folder == tmp_path / "run"
    assert_same_runs(folder, finished_run)


@pytest.mark.slow
def test_training_in_several_processes(shapes: Path, tmp_path: Path) -> None:
    variables = dict(os.environ)
    folder = train(
        TINY, coco_path=shapes, output_dir=tmp_path / "run", gpus=2, device="cpu",
        train_scales=[64, 80], batch_size=2, max_steps=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="training ended with exit code 2"):
        train(TINY, coco_path="none", output_dir=tmp_path / "two", gpus=2, device="cpu")
    assert dict(os.environ) == variables
    assert "train_scales:\n  - 64\n  - 80\n" in (folder / "config.yaml").read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_wrong_options_are_errors_that_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option 'learning_rate'"):
        train("finetune_small", learning_rate=1e-4)
    with pytest.raises(ConfigError, match=r"unknown option 'epoch'\. Did you mean 'epochs'"):
        train("finetune_small", epoch=3)
    with pytest.raises(ConfigError, match=r"lr: must be a number, not 'fast'"):
        train("finetune_small", lr="fast")
    with pytest.raises(ConfigError, match=r"unknown recipe 'hybrd'. Did you mean 'hybrid'"):
        train("finetune_small", recipes="hybrd")
    with pytest.raises(ConfigError, match="Did you mean 'finetune_small'"):
        train("finetune_smal")
    with pytest.raises(ConfigError, match="output_dir"):
        train("finetune_small", coco_path=tmp_path)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_of_the_documentation_runs(
    page: str, finished_run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is written, in a folder with files of these names; the preset there is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "deformable_detr", engine)  # as the installed package is named
    for split in ("train", "val"):
        Path(split).symlink_to(shapes / f"{split}2017")
        truth = shapes / "annotations" / f"instances_{split}2017.json"
        Path(f"{split}.json").symlink_to(truth)
    shutil.copy(next((shapes / "val2017").iterdir()), "photo.jpg")
    Path("runs/mine").mkdir(parents=True)
    shutil.copy(finished_run / "best.pth", "runs/mine")
    Path("finetune_small.yaml").write_text(f"base: {TINY}\noptim: {{epochs: 1}}\n")
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if "save_official" not in block:  # run with a ResNet in test_load.py
            exec(block, names)
    assert isinstance(names["detector"], Detector)
    if page == "docs/python.md":
        expected = names["detector"].evaluate(images="val/", annotations="val.json")
        assert names["numbers"] == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        assert (names["folder"] / "last.pth").is_file()
