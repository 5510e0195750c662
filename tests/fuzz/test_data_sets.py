"""Data sets of every format, fed with what is nearly sound: read, or refused in one line.

`make fuzz` tries very many more. A file that breaks a promise becomes a test of its own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.checks.entries import check_content
from datasets.formats.detect import locate
from datasets.formats.registry import Source, read_source
from datasets.index import CocoIndex, _load, _save
from engine.evaluation.detections import read_detections
from engine.evaluation.matching import Truth
from tests.fuzz.mutations import (
    EXAMPLES,
    ODD_VALUES,
    exchanged,
    fuzzed,
    mutated,
    only_refused,
)
from tests.fuzz.samples import (
    COCO,
    DATA_YAML,
    FOUND,
    LABELME,
    LABELS,
    LIST,
    NAMED,
    OBJ_DATA,
    ODD_COCO,
    PNG,
    POSE_YAML,
    XMLS,
)
from util.errors import DataError

VALUES = [value for value in ODD_VALUES if value != 10**5000]  # which `json` cannot write


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder that holds nothing else afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@st.composite
def spoiled(draw: st.DrawFn, sound: Any) -> bytes:
    """Draw JSON in which values or bytes are exchanged."""
    if draw(st.booleans()):
        return json.dumps(draw(exchanged(sound, VALUES))).encode()
    return draw(mutated([json.dumps(sound).encode()]))


def read_index(path: Path, images: Path | None) -> None:
    """Read a COCO-format file as training and evaluation do."""
    index = CocoIndex.load(path, images, need_boxes=True)
    index.report(1)
    Truth.of(index)


@fuzzed
@given(data=st.data())
def test_coco_files(tmp_path: Path, data: st.DataObject) -> None:
    sound = data.draw(st.sampled_from((COCO, ODD_COCO)))
    write(tmp_path / "set", {"5.png": PNG, "sub/5.png": PNG, "x.json": data.draw(spoiled(sound))})
    with only_refused():
        read_index(tmp_path / "set" / "x.json", tmp_path / "set")
    with only_refused():
        read_index(tmp_path / "set" / "x.json", None)


@fuzzed
@given(data=st.data())
def test_files_of_detections(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(COCO))
    truth = Truth.of(CocoIndex.load(path, None, need_boxes=True))
    path.write_bytes(data.draw(spoiled(data.draw(st.sampled_from((FOUND, NAMED))))))
    with only_refused():
        read_detections(path, truth)
    with only_refused():
        read_detections(path, truth, class_agnostic=True)


YOLO = {
    "images/1.png": PNG,
    "images/2.png": PNG,
    "labels/1.txt": LABELS[0],
    "labels/2.txt": LABELS[1],
    "data.yaml": DATA_YAML,
}
DARKNET = {
    **{name: content for name, content in YOLO.items() if name != "data.yaml"},
    "obj.data": OBJ_DATA,
    "obj.names": b"cat\ndog\n",
    "train.txt": LIST,
}
VOC = {
    "JPEGImages/1.png": PNG,
    **{f"Annotations/{i}.xml": content for i, content in enumerate(XMLS)},
}
VOC_LISTS = {**VOC, "ImageSets/Main/train.txt": b"0\n1 -1\nsub\\2.jpg\n"}
SETS: Mapping[str, Mapping[str, bytes]] = {
    "yolo": YOLO,
    "spelled": {"images/\u00c9.png": PNG, "labels/e\u0301.TXT": LABELS[0], "data.yaml": DATA_YAML,
                "images/a.heic": PNG, "labels/a.txt": LABELS[0]},
    "pose": {**YOLO, "data.yaml": POSE_YAML},
    "darknet": DARKNET,
    "classes": {"images/1.png": PNG, "labels/1.txt": LABELS[2], "classes.txt": b"cat\ndog\n"},
    "voc": VOC,
    "voc lists": VOC_LISTS,
    "labelme": {
        "1.png": PNG, "1.json": json.dumps(LABELME).encode(), "2.json": json.dumps(LABELME).encode()
    },
    "roboflow": {"train/5.png": PNG, "train/_annotations.coco.json": json.dumps(COCO).encode()},
    "coco": {"train2017/5.png": PNG,
             "annotations/instances_train2017.json": json.dumps(COCO).encode()},
}  # fmt: skip


@st.composite
def spoiled_set(draw: st.DrawFn, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Draw the files of a set of which one or two are changed, or are missing."""
    spoilt = dict(files)
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2)):
        if draw(st.integers(0, 9)) == 0:
            del spoilt[name]
            break
        if name.endswith(".json") and draw(st.booleans()):
            values = exchanged(json.loads(files[name]), VALUES)
            spoilt[name] = json.dumps(draw(values)).encode()
        else:
            spoilt[name] = draw(mutated([files[name]]))
    return spoilt


@fuzzed
@pytest.mark.parametrize("kind", SETS)
@given(data=st.data())
def test_sets(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    write(tmp_path / "set", data.draw(spoiled_set(SETS[kind])))
    with only_refused():
        located = locate(tmp_path / "set", "auto")
        for split in ("train", "val"):
            with only_refused():
                CocoIndex.from_source(located.read(split), need_boxes=True)
    for name in ("voc", "yolo", "labelme"):  # also where the user chose another than it is
        with only_refused():
            read_source(name, tmp_path / "set", "train")


@settings(fuzzed, max_examples=max(2, EXAMPLES // 10))
@pytest.mark.parametrize("kind", SETS)
@given(data=st.data())
def test_check_and_convert(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    from main import main

    write(tmp_path / "set", data.draw(spoiled_set(SETS[kind])))
    for name in ("out", "converted"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    common = ["--data_path", str(tmp_path / "set"), "--splits", "train"]
    with only_refused():
        code = main(["check", *common, "--num_workers", "0", "--output_dir", str(tmp_path / "out"),
                     "--fix", str(tmp_path / "out" / "fixed.json")])  # fmt: skip
        assert code in (0, 1, 2)
    with only_refused():
        code = main(["convert", *common, "--to", "coco", "--copy_images", "--output_dir",
                     str(tmp_path / "converted")])  # fmt: skip
        assert code in (0, 2)
        outside = [p for p in (tmp_path / "converted").rglob("*") if p.is_symlink()]
        assert not outside


@fuzzed
@given(data=st.data())
def test_kept_indices(tmp_path: Path, data: st.DataObject) -> None:
    """What another program has put into the cache is used only if it is as it was saved."""
    path = tmp_path / "kept"
    _save(path, check_content(Source(COCO, tmp_path, tmp_path / "x.json"), need_boxes=True))
    whole = path.read_bytes()
    damaged_later = data.draw(st.booleans())
    content = data.draw(mutated([whole if damaged_later else whole[32:]]))
    if not damaged_later:
        content = hashlib.sha256(content).digest() + content
    path.write_bytes(content)
    with only_refused():
        found = _load(path)
        assert found is None or not damaged_later or content == whole


@fuzzed
@given(data=st.data())
def test_names_that_lead_elsewhere(tmp_path: Path, data: st.DataObject) -> None:
    """A name of any kind is refused, or leads to an image of the set."""
    parts = st.sampled_from(
        ("..", ".", "", "/", "\\", "5.png", "train2017", "secret.png", "~", "%2e%2e", "\0",
         "a" * 300, "..\\", "file://", "C:", "5.PNG", "e\u0301", "\u202e", "\x1b[2J",
         str(tmp_path), "link")
    )  # fmt: skip
    separator = data.draw(st.sampled_from(("/", "\\", "//", "")))
    name = separator.join(data.draw(st.lists(parts, min_size=1, max_size=5)))
    images = [{"id": 1, "file_name": name}, {"id": 2, "file_name": "5.png"}]
    content = {**COCO, "images": images, "annotations": []}
    root = tmp_path / "set"
    write(root, {"train2017/5.png": PNG, "x.json": json.dumps(content).encode()})
    (tmp_path / "secret.png").write_bytes(PNG)
    os.symlink(tmp_path, root / "train2017" / "link")
    with only_refused(DataError):
        index = CocoIndex.load(root / "x.json", root / "train2017", need_boxes=False)
        for i in range(len(index)):
            path = index.image_dir / index.images.file_names[i]
            if os.path.isfile(path):
                inside = Path(os.path.normpath(path)).is_relative_to(root / "train2017")
                assert inside, path
