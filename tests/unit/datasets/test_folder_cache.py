"""The kept index of a folder of many files: used while no file has changed, and only then."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.schema import DataConfig
from datasets import index as index_module
from datasets.build import load_index
from datasets.formats import stamps
from datasets.formats.coco import read_coco_file
from datasets.formats.convert import convert
from datasets.index import CocoIndex, cache_folder
from tests.unit.datasets.test_index_cache import Content, Write, plain
from util.errors import DataError


@pytest.fixture
def place(content: Content, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a set that counts as large and old, in VOC's and YOLO's format, one with a flaw."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_MIN_FILES", 0)
    monkeypatch.setattr(stamps, "_SETTLED", -60.0)
    source = read_coco_file(*write(content))
    for target in ("voc", "yolo"):
        convert({"train": source, "val": source}, target, tmp_path / target, copy=True)
    (tmp_path / "voc/Annotations/9.xml").write_text("<annotation><object>")
    (tmp_path / "yolo/labels/train/9.txt").write_text("0 1 1\n")
    return tmp_path


def read(place: Path, data_format: str, *, cache: bool = True, **options: Any) -> CocoIndex:
    options = {"data_format": data_format, "data_path": str(place / data_format), **options}
    return load_index(DataConfig(**options, index_cache=cache), "train")


def kept() -> int:
    return len(list(cache_folder().iterdir()))


@pytest.mark.parametrize("data_format", ["voc", "yolo"])
def test_what_is_kept_is_what_was_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, data_format: str
) -> None:
    uncached = plain(read(place, data_format, cache=False))
    assert not cache_folder().exists()
    assert plain(read(place, data_format)) == uncached
    assert "unreadable_annotation" in [notice["kind"] for notice in uncached["notices"]]
    monkeypatch.setattr(index_module, "check_content", None)  # calling it would fail
    again = read(place, data_format)
    assert plain(again) == uncached
    assert again.place == place / data_format
    assert all((again.image_dir / name).is_file() for name in again.images.file_names)
    assert kept() == 1


def other_digit(file: Path) -> None:
    """Change a number; the size and the time of the last change stay."""
    before, text = file.stat(), file.read_text()
    digit = max(i for i, c in enumerate(text) if c in "123456")
    file.write_text(f"{text[:digit]}{int(text[digit]) + 1}{text[digit + 1 :]}")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def other_size(file: Path) -> None:
    with Image.open(file) as image:
        size = (image.width + 10, image.height + 20)
    Image.new("RGB", size).save(file)


def less_text(file: Path) -> None:
    file.write_text(file.read_text().replace("5\n", ""))


def other_name(file: Path) -> None:
    file.rename(file.with_suffix(".bmp"))


CHANGES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("voc", "Annotations/5.xml", other_digit),
    ("voc", "Annotations/5.xml", Path.unlink),
    ("voc", "ImageSets/Main/train.txt", less_text),
    ("voc", "JPEGImages/5.png", other_name),
    ("yolo", "labels/train/5.txt", other_digit),
    ("yolo", "labels/train/5.txt", Path.unlink),
    ("yolo", "images/train/5.png", other_size),
    ("yolo", "images/train/5.png", other_name),
    ("yolo", "*.yaml", lambda file: file.write_text(file.read_text().replace("cat", "cow"))),
]


@pytest.mark.parametrize(("data_format", "pattern", "change"), CHANGES)
def test_after_a_change_it_is_read_again(
    place: Path, data_format: str, pattern: str, change: Callable[[Path], object]
) -> None:
    before = plain(read(place, data_format))
    (file,) = (place / data_format).glob(pattern)
    change(file)
    uncached = plain(read(place, data_format, cache=False))
    assert uncached != before
    for _ in range(2):
        assert plain(read(place, data_format)) == uncached
    assert kept() == 2


def test_what_options_change_is_kept_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the option sets it
    for number, corners in enumerate(("pixels", "edges", "pixels", "edges")):
        index = read(place, "voc", voc_corners=corners)
        assert plain(index) == plain(read(place, "voc", cache=False, voc_corners=corners))
        assert kept() == min(number + 1, 2)
    cfg = DataConfig(data_path=str(place / "yolo"), max_pixels=10)
    with pytest.raises(DataError, match="over the 10 of `max_pixels`"):
        load_index(cfg, "train", need_boxes=False)
    cfg = DataConfig(data_path=str(place / "yolo"), max_pixels=10**6)
    assert load_index(cfg, "train", need_boxes=False).images.sizes.max() == 40


@pytest.mark.parametrize("setting", [("_MIN_FILES", 10**6), ("_SETTLED", 60.0)])
def test_few_files_or_new_ones_are_read_each_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, setting: tuple[str, float]
) -> None:
    monkeypatch.setattr(index_module if setting[0] == "_MIN_FILES" else stamps, *setting)
    read(place, "yolo")
    assert not cache_folder().exists()


def test_a_set_without_boxes_is_kept_for_evaluation_and_refused_in_training(place: Path) -> None:
    for file in (place / "yolo" / "labels" / "train").iterdir():
        file.unlink()
    cfg = DataConfig(data_format="yolo", data_path=str(place / "yolo"))
    for _ in range(2):
        assert len(load_index(cfg, "train", need_boxes=False).annotations.ids) == 0
        with pytest.raises(Exception, match="none of the 0 annotations is a usable box"):
            load_index(cfg, "train")
