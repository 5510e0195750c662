"""Sets of data whose files are something else, or lead somewhere else."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.conftest import TINY, Cli, read_log
from tests.integration.test_wrong_use import assert_one_line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pipes and /dev/zero")


@pytest.fixture
def hostile(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the data set in which two images are no files."""
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    pipe, endless = sorted((data / "train2017").iterdir())[:2]
    pipe.unlink()
    os.mkfifo(pipe)
    endless.unlink()
    endless.symlink_to("/dev/zero")
    return data


def test_images_that_are_no_files_are_missing_or_unreadable(
    cli: Cli, hostile: Path, tmp_path: Path
) -> None:
    names = [path.name for path in sorted((hostile / "train2017").iterdir())[:2]]
    done = cli("check", "--coco_path", hostile, "--output_dir", tmp_path / "c")
    assert done.returncode == 1, done.stderr
    assert all(name in done.stdout for name in names)
    done = cli("train", "--config", TINY, "--coco_path", hostile, "--output_dir", tmp_path / "o",
               "--epochs", "1", "--no_tensorboard")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "o")[-1]["epoch"] == 0
    assert all(name in done.stdout for name in names)


@pytest.mark.parametrize("what", ["annotations", "checkpoint", "detections", "options", "folder"])
def test_special_files_are_one_line_errors(
    cli: Cli, shapes: Path, tmp_path: Path, what: str
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    truth = shapes / "annotations" / "instances_val2017.json"
    zero = tmp_path / "zero.json"
    zero.symlink_to("/dev/zero")
    arguments: dict[str, tuple[str | Path, ...]] = {
        "annotations": ("eval", "--detections", truth, "--val_annotations", zero),
        "checkpoint": ("eval", "--checkpoint", pipe),
        "detections": ("eval", "--detections", pipe, "--val_annotations", truth),
        "options": ("train", "--config", pipe),
        "folder": ("train", "--resume", pipe),
    }
    name = "zero.json" if what == "annotations" else "pipe"
    assert_one_line(cli(*arguments[what], "--output_dir", tmp_path / "o"), name)


def test_conversion_never_copies_images_from_outside_the_set(cli: Cli, tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret.png"
    (data / "train2017").mkdir(parents=True)
    (data / "annotations").mkdir()
    Image.new("RGB", (8, 8)).save(secret)
    Image.new("RGB", (8, 8)).save(data / "train2017" / "b.png")
    (data / "train2017" / "a.png").symlink_to("b.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4],
                         "area": 16, "iscrowd": 0}],
    }  # fmt: skip
    (data / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    convert = ("convert", "--data_path", data, "--splits", "train", "--to", "yolo")
    done = cli(*convert, "--copy_images", "--output_dir", tmp_path / "inside")
    assert done.returncode == 0, done.stderr
    assert not next((tmp_path / "inside").rglob("a.png")).is_symlink()
    (data / "train2017" / "a.png").unlink()
    (data / "train2017" / "a.png").symlink_to(secret)
    done = cli(*convert, "--copy_images", "--output_dir", tmp_path / "outside")
    assert_one_line(done, "a.png", "is a link out of the data set", str(secret), "--copy_images")
    assert not (tmp_path / "outside").exists()
    done = cli(*convert, "--output_dir", tmp_path / "linked")
    assert done.returncode == 0, done.stderr


def test_an_output_folder_that_is_not_utf_8(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff\x1b")
    options = ("--max_steps", "1", "--num_workers", "0")
    done = cli("train", "--config", TINY, "--coco_path", shapes, "--output_dir", folder, *options)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    done = cli("train", "--resume", folder / "last.pth", "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    done = cli("train", "--config", folder / "config.yaml", "--output_dir", tmp_path / "again",
               *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
