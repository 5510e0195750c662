"""File names as other programs and systems write them: matched, or missing with a reason."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.checks import names as names_module
from datasets.formats.registry import Source
from datasets.index import CocoIndex
from util.errors import DataError

Read = Callable[..., CocoIndex]
BOX = {"category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write files into data/images, and read a set that names them so."""

    def read_set(files: list[str], names: list[str], **more: Any) -> CocoIndex:
        folder = tmp_path / "data" / "images"
        for file in files:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 10)).save(path, format="PNG")
        images = [
            {"id": i, "file_name": name, "width": 20, "height": 10, **more}
            for i, name in enumerate(names, 1)
        ]
        boxes = [{**BOX, "id": i, "image_id": i} for i in range(1, len(names) + 1)]
        content = {
            "images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}],
        }  # fmt: skip
        return CocoIndex.from_source(Source(content, folder, Path("set.json")), need_boxes=True)

    return read_set


def found(index: CocoIndex) -> list[str]:
    return list(index.images.file_names)


def kinds(index: CocoIndex) -> dict[str, int]:
    return {finding.kind: finding.count for finding in index.findings}


@pytest.mark.parametrize(
    ("file", "name", "way"),
    [
        ("part/a.png", "part\\a.png", "/ for \\"),
        ("a.png", "images/a.png", "without the folder's own name"),
        ("a.png", "data/images/a.png", "without the folder's own name"),
        ("a.png", "images\\a.png", "/ for \\, without the folder's own name"),
        ("my cup.png", "my%20cup.png", "unquoted"),
        ("é.png", unicodedata.normalize("NFD", "é.png"), "other form of accents"),
        ("Part/A.PNG", "part/a.png", "other case"),
        ("a.png", "a", "other suffix"),
        ("a.b.png", "a.b", "other suffix"),
        ("a.png", "a.JPG", "other suffix"),
        ("a.png", "images/1/a.png", "end of the path"),
        ("part/a.png", "/home/me/part/a.png", "end of the path"),
        ("part/a.png", "C:\\me\\part\\a.png", "end of the path"),
        ("a.png", "../a.png", "end of the path"),
        ("part/a.png", "http://host/x/a.png?size=3", "base name"),
        ("part/A.png", "x/a.PNG", "base name, other case"),
        ("part/a.png", "x/a.jpg", "base name, other suffix"),
    ],
)
def test_names_are_matched_and_how_is_reported(read: Read, file: str, name: str, way: str) -> None:
    index = read([file, "other.png"], [name])
    assert found(index) == [file]
    assert kinds(index) == {"matched_name": 1}
    assert f"({way})" in index.notices[0]
    assert len(index.boxes) == 1


def test_absolute_names_are_accepted_only_inside_the_folder(read: Read, tmp_path: Path) -> None:
    inside = str(tmp_path / "data" / "images" / "a.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.png")
    index = read(["a.png"], [inside, str(tmp_path / "b.png")])
    assert found(index) == ["a.png"]
    assert kinds(index) == {"matched_name": 1, "outside_folder": 1}
    assert index.images.ids.tolist() == [1]
    assert index.annotations.ids.tolist() == [1], "its box is left out, too"


def test_a_name_that_fits_several_files_is_missing(read: Read) -> None:
    index = read(["a/x.png", "b/x.png", "c.png"], ["elsewhere/x.png", "c.png"])
    assert found(index) == ["elsewhere/x.png", "c.png"]
    assert kinds(index)["missing_image"] == 1
    assert len(index.boxes) == 1


def test_no_file_serves_two_names(read: Read) -> None:
    assert kinds(read(["a.png", "b.png"], ["a", "A.jpg", "b.png"])) == {"missing_image": 2}
    assert kinds(read(["c.png"], ["c.png", "x/c.png"]))["missing_image"] == 1
    assert kinds(read(["d.png"], ["x/d.png", "x/d.png"])) == {"matched_name": 2}


def test_an_image_is_missing_where_others_of_its_folder_are_found(read: Read) -> None:
    """One of the same name elsewhere is another image."""
    index = read(["train/1.png", "val/2.png"], ["train/1.png", "train/2.png"])
    assert kinds(index) == {"missing_image": 1}


def test_missing_files_come_with_the_closest_name(read: Read) -> None:
    index = read(["kettle_0001.png", "b.png"], ["kettle_001.png", "b.png"])
    assert "'kettle_001.png' the closest is 'kettle_0001.png'" in index.notices[0]
    with pytest.raises(DataError, match=r"no such image.*the closest is 'kettle_0001\.png'"):
        read([], ["kettle_01.png"])


def test_files_of_a_mac_and_other_files_are_no_images(read: Read, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "images"
    (folder / "x").mkdir(parents=True)
    for name in ("x/._a.png", "a.txt", "a.json"):
        (folder / name).write_bytes(b"\0" * 64)
    assert found(read(["x/a.png"], ["y/a.jpg"])) == ["x/a.png"]


def test_lvis_names_images_by_address_alone(read: Read) -> None:
    index = read(["train/7.png"], [""], coco_url="http://images.org/train/7.png")
    assert found(index) == ["train/7.png"]
    assert kinds(index) == {"name_from_url": 1, "matched_name": 1}


@pytest.mark.parametrize(
    ("files", "name", "addresses", "expected"),
    [
        (["9.png"], "set_v1_9.png", {"coco_url": "http://images.org/train/9.png"}, "9.png"),
        (["b/9.png"], "x.png", {"coco_url": "http://images.org/train/9.png"}, "b/9.png"),
        (["81_z.png"], "x.png", {"flickr_url": "http://farm.org/8186/81_z.png"}, "81_z.png"),
        (["9.png", "81_z.png"], "x.png",
         {"flickr_url": "http://f.org/8186/81_z.png", "coco_url": "http://c.org/9.png"}, "9.png"),
        (["9.png", "8.png"], "8.png", {"coco_url": "http://images.org/train/9.png"}, "8.png"),
        (["a/9.png", "b/9.png"], "x.png", {"coco_url": "http://images.org/9.png"}, None),
        (["9.png"], "x.png", {"coco_url": 7, "flickr_url": None}, None),
        (["9.png"], "x.png", {"coco_url": "http://images.org/" + "9" * 9000 + "/9.png"}, None),
    ],
)  # fmt: skip
def test_an_address_is_the_last_way_to_find_an_image(
    read: Read, files: list[str], name: str, addresses: dict[str, Any], expected: str | None
) -> None:
    index = read([*files, "other.png"], [name, "other.png"], **addresses)
    assert found(index)[0] == (expected or name)
    way = {None: {"missing_image": 1}, name: {}}.get(expected, {"matched_name": 1})
    assert kinds(index) == way
    assert ("(end of its address)" in "".join(index.notices)) == (way == {"matched_name": 1})


def test_one_file_does_not_serve_the_addresses_of_two_images(read: Read) -> None:
    index = read(["9.png", "o.png"], ["x.png", "y.png", "o.png"], coco_url="http://c.org/9.png")
    assert kinds(index) == {"missing_image": 2}


def test_whole_disks_and_huge_folders_are_not_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert names_module._list_files(Path("/")) == []
    for name in "abc":
        (tmp_path / name).write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names_module._list_files(tmp_path) == ["a", "b", "c"]
    monkeypatch.setattr(names_module, "_LISTED", 2)
    assert names_module._list_files(tmp_path) == []


@given(st.text("./\\:\0a", max_size=8))
def test_a_name_that_may_lead_out_of_its_folder_is_not_inside(name: str) -> None:
    expected = name[:1] != "/" and ".." not in name.split("/") and "\0" not in name
    assert names_module.is_inside(name) == expected
