"""Sets of data whose files are something else, or lead somewhere else."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.attacks import USUAL, assert_refused, attack
from tests.integration.conftest import TINY, read_log

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


def test_images_that_are_no_files_are_missing_or_unreadable(hostile: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted((hostile / "train2017").iterdir())[:2]]
    done = attack(tmp_path, "check", "--coco_path", hostile, "--output_dir", tmp_path / "c",
                  "--num_workers", "0")  # fmt: skip
    assert done.code == 1, done.output
    assert all(name in done.output for name in names)
    done = attack(tmp_path, "train", "--config", TINY, "--coco_path", hostile, "--output_dir",
                  tmp_path / "o", "--epochs", "1", "--no_tensorboard", **USUAL)  # fmt: skip
    assert done.code == 0, done.output
    assert read_log(tmp_path / "o")[-1]["epoch"] == 0
    assert all(name in done.output for name in names)


def test_conversion_never_copies_images_from_outside_the_set(tmp_path: Path) -> None:
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
    done = attack(tmp_path, *convert, "--copy_images", "--output_dir", tmp_path / "inside")
    assert done.code == 0, done.output
    assert not next((tmp_path / "inside").rglob("a.png")).is_symlink()
    (data / "train2017" / "a.png").unlink()
    (data / "train2017" / "a.png").symlink_to(secret)
    done = attack(tmp_path, *convert, "--copy_images", "--output_dir", tmp_path / "outside")
    assert_refused(done, "a.png", "is a link out of the data set", str(secret), "--copy_images")
    assert not (tmp_path / "outside").exists()
    done = attack(tmp_path, *convert, "--output_dir", tmp_path / "linked")
    assert done.code == 0, done.output


def test_a_list_of_images_copies_no_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "home" / "key.png"
    secret.parent.mkdir()
    secret.write_text("secret")
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "images" / "a.png")
    (tmp_path / "data" / "train.txt").write_text(f"images/a.png\n{secret}\n")
    (tmp_path / "data" / "data.yaml").write_text("train: train.txt\nnames: [a]\n")
    done = attack(tmp_path, "convert", "--data_path", tmp_path / "data", "--splits", "train",
                  "--to", "coco", "--copy_images", "--output_dir", tmp_path / "o")  # fmt: skip
    assert done.code in (0, 2), done.output
    copied = [path for path in (tmp_path / "o").rglob("*") if path.is_file()]
    assert not [path for path in copied if path.read_bytes() == b"secret"]


def test_an_output_folder_that_is_not_utf_8(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff\x1b")
    options = ("--max_steps", "1", "--num_workers", "0")
    train = ("train", "--config", TINY, "--coco_path", shapes, "--output_dir", folder)
    done = attack(tmp_path, *train, *options, **USUAL)
    assert done.code == 0, done.output
    done = attack(tmp_path, "train", "--resume", folder / "last.pth", "--max_steps", "2", **USUAL)
    assert done.code == 0, done.output
    done = attack(tmp_path, "train", "--config", folder / "config.yaml", "--output_dir",
                  tmp_path / "again", *options, **USUAL)  # fmt: skip
    assert done.code == 0, done.output
