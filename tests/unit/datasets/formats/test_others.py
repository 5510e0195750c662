"""What people give in the place of a data set's files is named, with what to do."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from configs.schema import DataConfig
from datasets.build import load_index, read_split
from datasets.index import CocoIndex
from engine.evaluation.detections import read_detections
from engine.evaluation.matching import Truth
from tests.unit.datasets.formats.exports import (
    coco_content,
    save_images,
    voc_text,
    write_coco,
    write_voc,
    write_yaml,
    write_yolo,
)
from util.errors import DataError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"<!DOCTYPE html>\n<html><p>Sign in</html>"
LABELME = {"imagePath": "a.png", "shapes": []}


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ann.json", json.dumps(coco_content(["a.png"])))
    return buffer.getvalue()


COCO = json.dumps(coco_content(["a.png"])).encode()
IN_PLACE: dict[str, tuple[bytes, str]] = {
    "ann.json": (POINTER, "is a Git LFS pointer. Run `git lfs pull` to fetch the file."),
    "page.json": (PAGE, "is a web page. Download it again"),
    "ann.json.gz": (gzip.compress(COCO, mtime=0), "is packed (gzip). Unpack it."),
    "ann.zip": (zipped(), "is packed (ZIP). Unpack it."),
    "blank.json": (b" \n", "not JSON: the file is empty"),
    "lines.json": (b'{"a": 1}\n{"a": 2}\n', "line 2 column 1. It looks like JSON lines, which is"),
    "set.jsonl": (b"{}\n{}\n", "It looks like JSON lines, which is not read. Export the data as"),
    "set.csv": (b"a,b\n", "It looks like a table (CSV), which is not read"),
    "create.json": (
        b'[{"image": "a", "annotations": [{"coordinates": {}}]}]',
        "must hold a JSON object, not a list. It looks like Create ML JSON, which is not read",
    ),
    "via.json": (
        b'{"a.png9": {"regions": [{"shape_attributes": {}}]}}',
        "there is no list `images`. Use a COCO-format file of object instances. It looks like VGG",
    ),
    "a.json": (json.dumps(LABELME).encode(), "It looks like labelme's: set `data_path` to the"),
    "a.xml": (voc_text().encode(), "It looks like VOC's XML: set `data_path` to the folder"),
    "data.yaml": (b"train: images\nnames: [a]\n", "It looks like YOLO's data.yaml: set"),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_given_for_a_coco_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = IN_PLACE[name]
    save_images(tmp_path / "images")
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        CocoIndex.load(file, tmp_path / "images", need_boxes=True)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_a_damaged_coco_file_is_nothing_else(tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    file = tmp_path / "ann.json"
    file.write_bytes(COCO[:-9])
    with pytest.raises(DataError, match=r"not JSON: .* column \d+\.$"):
        CocoIndex.load(file, tmp_path / "images", need_boxes=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"is a Git LFS pointer\. Run"),
        (gzip.compress(b"[]", mtime=0), r"is packed \(gzip\)\. Unpack it"),
        (b'{"a": 1}\n{"a": 2}\n', r"not valid JSON .* A list of all is needed, not JSON lines"),
    ],
)
def test_what_is_given_for_detections_is_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    write_coco(tmp_path / "ann.json", tmp_path / "images", names=lambda path: path.name)
    truth = Truth.of(CocoIndex.load(tmp_path / "ann.json", None, need_boxes=True))
    (tmp_path / "found.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_detections(tmp_path / "found.json", truth)


def test_pointers_in_the_place_of_annotations_are_named(tmp_path: Path) -> None:
    message = "it is a Git LFS pointer. Run `git lfs pull` to fetch the file"
    write_voc(tmp_path / "voc" / "train", tmp_path / "voc" / "train")
    write_yolo(tmp_path / "yolo" / "images", tmp_path / "yolo" / "labels")
    write_yaml(tmp_path / "yolo", train="images")
    for name in ("voc/train/shot_1.xml", "yolo/labels/shot_1.txt"):
        (tmp_path / name).write_bytes(POINTER)
    for place in ("voc", "yolo"):
        source = read_split(DataConfig(data_path=str(tmp_path / place)), "train")
        ((_, detail),) = source.findings["unreadable_annotation"]
        assert detail == message
    (tmp_path / "yolo" / "data.yaml").write_bytes(POINTER)
    with pytest.raises(DataError, match=r"data\.yaml: not YAML: it is a Git LFS pointer"):
        read_split(DataConfig(data_path=str(tmp_path / "yolo" / "data.yaml")), "train")


def test_an_archive_in_the_place_of_a_folder_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(zipped())
    with pytest.raises(
        DataError, match=r"set\.zip: is packed \(ZIP\)\. Unpack it\. Then set `data"
    ):
        load_index(DataConfig(data_path=str(tmp_path / "set.zip")), "train")


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    """As of an export with a part for training alone."""
    write_coco(tmp_path / "train" / "_annotations.coco.json", tmp_path / "train")
    message = (
        r"no COCO-format file of the split 'val'\. Splits there: train\. Choose with "
        "`train_split` and `val_split`, or leave val out: `no_validate` to train"
    )
    with pytest.raises(DataError, match=message):
        load_index(DataConfig(data_path=str(tmp_path)), "val")
    with pytest.raises(DataError, match="split 'test'"):
        load_index(DataConfig(data_path=str(tmp_path), train_split="test"), "train")
