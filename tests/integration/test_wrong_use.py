"""Wrong use is one line and exit code 2; flawed data is fixed, counted and named."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import TINY, Cli, read_log


def assert_one_line(done: Any, *parts: str) -> None:
    """Check exit code 2 and a single line of error that holds every part."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert len(lines[0]) <= 520
    for part in parts:
        assert part in lines[0], lines[0]


def yaml_with(key: str) -> Callable[[Path], list[str]]:
    """Return arguments that name a YAML file with an unknown key."""

    def arguments(folder: Path) -> list[str]:
        file = folder / "mine.yaml"
        file.write_text(f"optim:\n  {key}: 1\n")
        return ["train", "--config", str(file)]

    return arguments


WRONG_OPTIONS: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "unknown command": (lambda f: ["trian"], ("trian", "train")),
    "unknown option": (lambda f: ["train", "--num_querys", "3"], ("--num_querys", "--num_queries")),
    "unknown key": (yaml_with("batchsize"), ("mine.yaml", "optim.batchsize", "batch_size")),
    "no value": (lambda f: ["train", "--config"], ("--config", "argument")),
    "unread option": (lambda f: ["eval", "--hflip", "1"], ("--hflip",)),
    "unwritable folder": (
        lambda f: ["train", "--config", TINY, "--output_dir", "/proc/nowhere"],
        ("--output_dir", "/proc/nowhere"),
    ),
    "wrong type": (lambda f: ["train", "--epochs", "many"], ("--epochs", "many")),
    "two stage": (lambda f: ["train", "--two_stage"], ("--two_stage", "--with_box_refine")),
    "no output folder": (lambda f: ["train", "--coco_path", str(f)], ("--output_dir",)),
    "no data": (lambda f: ["train", "--output_dir", str(f / "o")], ("--coco_path",)),
    "missing folder": (
        lambda f: ["train", "--coco_path", str(f / "nowhere"), "--output_dir", str(f / "o")],
        ("nowhere", "train2017"),
    ),
    "missing config": (lambda f: ["train", "--config", "none.yaml"], ("none.yaml", "configs/")),
    "missing checkpoint": (
        lambda f: ["eval", "--checkpoint", str(f / "none.pth")],
        ("none.pth",),
    ),
    "batch beyond sense": (
        lambda f: ["train", "--batch_size", "1e12"],
        ("--batch_size: must be at most 65536, not 1000000000000",),
    ),
    "workers beyond sense": (
        lambda f: ["train", "--num_workers", "100000"],
        ("--num_workers: must be at most 1024",),
    ),
    "a number of 5,000 digits": (
        lambda f: ["train", "--num_queries", "9" * 5000],
        ("--num_queries: must be at most 100000",),
    ),
    "infinite rate": (lambda f: ["train", "--lr", "inf"], ("--lr: must be at most", "inf")),
    "device without numbers": (
        lambda f: ["predict", "--checkpoint", "x", "--input", TINY, "--output_dir", str(f / "o"),
                   "--device", "meta"],
        ("--device meta: cannot be used here",),
    ),
    "name too long": (
        lambda f: ["train", "--config", TINY, "--output_dir", str(f / ("o" * 5000))],
        ("--output_dir", "name too long"),
    ),
    "names that a terminal obeys": (
        lambda f: ["eval", "--checkpoint", str(f / "a\x1b[2J\nb.pth")],
        (r"a\x1b[2J\nb.pth", "no such file"),
    ),
    "no image": (
        lambda f: ["predict", "--checkpoint", "x", "--input", str(f / "none.jpg"),
                   "--output_dir", str(f / "o")],
        ("none.jpg",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(cli: Cli, tmp_path: Path, case: str) -> None:
    arguments, parts = WRONG_OPTIONS[case]
    assert_one_line(cli(*arguments(tmp_path)), *parts)


def train_on(cli: Cli, data: Path, out: Path, *options: str) -> Any:
    """Train the tiny model for one epoch."""
    return cli("train", "--config", TINY, "--coco_path", data, "--output_dir", out,
               "--epochs", "1", "--no_tensorboard", *options)  # fmt: skip


@pytest.fixture
def copied(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to spoil."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def edit(data: Path, change: Callable[[dict[str, Any]], None], split: str = "train") -> None:
    """Change an annotation file in place."""
    file = data / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_missing_json(cli: Cli, copied: Path, tmp_path: Path) -> None:
    (copied / "annotations" / "instances_val2017.json").unlink()
    assert_one_line(train_on(cli, copied, tmp_path / "o"), "instances_val2017.json")


def test_json_without_needed_keys(cli: Cli, copied: Path, tmp_path: Path) -> None:
    edit(copied, lambda content: content.pop("categories"))
    done = train_on(cli, copied, tmp_path / "o")
    assert_one_line(done, "instances_train2017.json", "categories")


def test_truncated_checkpoint(cli: Cli, finished_run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.pth"
    whole = (finished_run / "last.pth").read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    assert_one_line(cli("eval", "--checkpoint", half), "half.pth")


class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "bare"])
def test_malicious_pickle_is_not_executed(cli: Cli, tmp_path: Path, form: str) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"model": {}, "args": Malicious(trace)}
    if form == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    assert_one_line(cli("eval", "--checkpoint", file), "evil.pth")
    assert not trace.exists()


def test_a_run_is_not_overwritten(cli: Cli, finished_run: Path, shapes: Path) -> None:
    before = (finished_run / "last.pth").read_bytes()
    assert_one_line(train_on(cli, shapes, finished_run), "--resume")
    assert (finished_run / "last.pth").read_bytes() == before


def test_classes_that_the_model_does_not_know(
    cli: Cli, finished_run: Path, copied: Path, tmp_path: Path
) -> None:
    edit(copied, lambda c: c["categories"][0].update(name="dodecahedron"), "val")
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--coco_path", copied,
               "--output_dir", tmp_path)  # fmt: skip
    assert_one_line(done, "dodecahedron")


def test_debug_shows_the_traceback(cli: Cli) -> None:
    done = cli("train", "--debug")
    assert "Traceback" in done.stderr


def test_training_continues_without_an_unreadable_image(
    cli: Cli, copied: Path, tmp_path: Path
) -> None:
    spoiled = sorted((copied / "train2017").iterdir())[3]
    spoiled.write_bytes(spoiled.read_bytes()[:400])
    done = train_on(cli, copied, tmp_path / "o", "--num_queries", "2")
    assert done.returncode == 0, done.stderr
    assert spoiled.name in done.stdout + done.stderr
    assert read_log(tmp_path / "o")[-1]["train_unreadable_images"] == 1
    assert "more boxes" in done.stdout  # than queries, which is reported too


def test_flawed_annotations_are_fixed_counted_and_named(
    cli: Cli, copied: Path, tmp_path: Path
) -> None:
    def spoil(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation.pop("area", None)
            annotation.pop("iscrowd", None)
        first, second, third = content["annotations"][:3]
        first["bbox"][2] = 0
        second["bbox"][3] = -5
        third["bbox"][0] = 10_000
        empty = content["images"][-1]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]

    edit(copied, spoil)
    bad = json.loads((copied / "annotations" / "instances_train2017.json").read_text())
    ids = [a["id"] for a in bad["annotations"][:3]]
    done = train_on(cli, copied, tmp_path / "o")
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stdout.splitlines() if "notice:" in line]
    text = "\n".join(notices)
    assert "area" in text
    assert "iscrowd" in text
    assert "without boxes" in text
    for annotation_id in ids:
        assert f"annotation {annotation_id} " in text, text
