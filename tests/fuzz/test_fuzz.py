"""Readers of files, fed with what is nearly sound: they read it or refuse it in one line.

`make fuzz` tries very many more. A file that breaks a promise becomes a test of its own.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.load import Given, load_file
from configs.schema import SECTIONS, Config
from datasets.formats.registry import read_source
from datasets.images import READ_ERRORS, read_header, read_rgb
from datasets.index import CocoIndex
from datasets.samplers import BatchSplit
from engine.checkpoint import load_checkpoint
from engine.evaluation.detections import read_detections
from engine.evaluation.matching import Truth
from engine.run_log import RunLog
from engine.trainer import Trainer
from models.weights.load import load_pretrained
from tests.fuzz.mutations import (
    EXAMPLES,
    ODD_TENSORS,
    ODD_VALUES,
    exchanged,
    fuzzed,
    mutated,
    only_refused,
)
from tests.unit.engine.shared_steps import IMAGES, micro_batches, small_trainer, train_epoch

COCO: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (5, 9, 2)],
    "annotations": [
        {"id": i, "image_id": image, "category_id": 7, "bbox": [4, 6, 10.5, 12], "area": 126.0,
         "iscrowd": 0, "segmentation": [[4, 6, 14, 6, 14, 18]]}
        for i, image in enumerate((5, 9, 2))
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
}  # fmt: skip
FOUND = [{"image_id": 5, "category_id": 7, "bbox": [4, 6, 10, 12], "score": 0.5}] * 3
CONFIG = b"""base: shapes_tiny
model: &m {backbone: resnet18, num_queries: 30, nheads: 8, two_stage: false}
data: {train_scales: [64, 96], hflip: 0.5, augment: none}
optim: {lr: 1e-4, epochs: 3, lr_drop_epochs: [1, 2]}
"""
DATA_YAML = b"path: .\ntrain: images\nval: images\nnc: 2\nnames: {0: cat, 1: dog}\n"
LABELS = b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.5 0.9\n"
XML = b"""<annotation><filename>1.png</filename><size><width>40</width><height>30</height></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>9</xmax>
<ymax>20</ymax></bndbox></object></annotation>
"""


# an orientation of 6
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def image_bytes(suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


PICTURES = [
    image_bytes("png"), image_bytes("jpeg", exif=EXIF),
    image_bytes("jpeg", progressive=True), image_bytes("bmp"), image_bytes("tiff"),
    image_bytes("tiff", compression="tiff_lzw"), image_bytes("webp"), image_bytes("gif"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer after two steps, with a checkpoint in its folder."""
    folder = tmp_path_factory.mktemp("run")
    batches = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    with RunLog(folder, tensorboard=False) as log:
        trainer = small_trainer(folder, log, batches, ema_decay=0.5)
        trainer.identity = {"classes": {"ids": [1], "names": ["a"]}, "config": {"model": {}},
                            "versions": {}}  # fmt: skip
        train_epoch(trainer)
        trainer.save()
    return trainer


@fuzzed
@given(data=st.data())
def test_bytes_of_checkpoints(trainer: Trainer, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.pth"
    content = {"model": {"w": torch.arange(6.0)}, "epoch": 3, "optimizer": [1, "x", (None, 2.5)]}
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(data.draw(mutated([path.read_bytes()])))
        with only_refused():
            load_checkpoint(path)
        with only_refused():
            load_pretrained(str(path))


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each restores a whole run
@given(data=st.data())
def test_values_of_checkpoints(trainer: Trainer, data: st.DataObject) -> None:
    sound = load_checkpoint(trainer.checkpoints.last)
    content = data.draw(exchanged(sound, [*ODD_VALUES, *ODD_TENSORS]))
    with only_refused():
        # what `load_checkpoint` looks at
        if all(isinstance(content.get(key), dict) for key in ("model", "optimizer", "lr_scheduler",
                                                              "progress")):  # fmt: skip
            trainer.load_state_dict({"scaler": {}, "ema": {}, "best": {}, **content})


@fuzzed
@given(data=st.data())
def test_coco_files(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "5.png").write_bytes(PICTURES[0])
    values = [v for v in ODD_VALUES if v != 10**5000]
    text = json.dumps(data.draw(exchanged(COCO, values)))
    path = tmp_path / "x.json"
    for content in (text.encode(), data.draw(mutated([json.dumps(COCO).encode()]))):
        path.write_bytes(content)
        with only_refused():
            index = CocoIndex.load(path, tmp_path, need_boxes=True)
            index.report(1)
            Truth.of(index)


@fuzzed
@given(data=st.data())
def test_files_of_detections(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(COCO))
    truth = Truth.of(CocoIndex.load(path, None, need_boxes=True))
    values = [v for v in ODD_VALUES if v != 10**5000]
    text = json.dumps(data.draw(exchanged(FOUND, values)))
    for content in (text.encode(), data.draw(mutated([json.dumps(FOUND).encode()]))):
        path.write_bytes(content)
        with only_refused():
            read_detections(path, truth)


@fuzzed
@given(data=st.data())
def test_yolo_sets(tmp_path: Path, data: st.DataObject) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for name in ("1", "2"):
        (tmp_path / "images" / f"{name}.png").write_bytes(PICTURES[0])
    (tmp_path / "labels" / "1.txt").write_bytes(LABELS)
    (tmp_path / "labels" / "2.txt").write_bytes(data.draw(mutated([LABELS])))
    for content in (DATA_YAML, data.draw(mutated([DATA_YAML]))):
        (tmp_path / "data.yaml").write_bytes(content)
        with only_refused():
            CocoIndex.from_source(read_source("yolo", tmp_path, "train"), need_boxes=True)


@fuzzed
@given(data=st.data())
def test_voc_sets(tmp_path: Path, data: st.DataObject) -> None:
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "JPEGImages" / "1.png").write_bytes(PICTURES[0])
    (tmp_path / "Annotations" / "0.xml").write_bytes(XML)
    (tmp_path / "Annotations" / "1.xml").write_bytes(data.draw(mutated([XML])))
    with only_refused():
        CocoIndex.from_source(read_source("voc", tmp_path, "train"), need_boxes=True)


@fuzzed
@given(data=st.data())
def test_files_of_options(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data.draw(mutated([CONFIG])))
    with only_refused():
        values = load_file(path, SECTIONS, Path("configs"))
        assert isinstance(Given(values).config(), Config)


@fuzzed
@given(data=st.data())
def test_images(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x"
    path.write_bytes(data.draw(mutated(PICTURES)))
    read_header(path)
    with only_refused(*READ_ERRORS):
        read_rgb(path, None)
