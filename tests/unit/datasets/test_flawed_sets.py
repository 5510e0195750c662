"""Random flawed sets in every format: told and counted, never fatal, and sound pictures untouched.

Each flaw is put into a picture of its own; the first picture stays sound. The oracle for sound
pictures is the same set without flaws.
"""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.coco import CocoDetection, CocoIndex
from datasets.convert import convert
from datasets.sources import Source, read_source
from datasets.transforms import EvalTransform
from util.batch import UnreadableImage
from util.errors import DataError

Content = dict[str, Any]
Targets = dict[str, list[tuple[str, list[float]]]]
WIDTH, HEIGHT, NUM_PICTURES = 40, 30, 5
PLAIN = EvalTransform(eval_scale=16, max_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
FORMATS = ("coco", "voc", "yolo")
SOUND: Content = {
    "images": [
        {"id": 10 * i, "file_name": f"p{i}.png", "width": WIDTH, "height": HEIGHT}
        for i in range(NUM_PICTURES)
    ],
    "annotations": [
        {"id": 2 * i + k, "image_id": 10 * i, "category_id": 3 + 4 * k, "area": 50, "iscrowd": 0,
         "bbox": [2 + i, 3 + k, 10, 5 + i]}
        for i in range(NUM_PICTURES) for k in range(2)
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
}  # fmt: skip


def write_sound(folder: Path, target: str) -> Path:
    pictures = folder / "pictures"
    pictures.mkdir()
    for image in SOUND["images"]:
        Image.new("RGB", (WIDTH, HEIGHT), (image["id"], 99, 0)).save(pictures / image["file_name"])
    convert({"train": Source(SOUND, pictures, folder)}, target, folder / "set", copy=True)
    return folder / "set"


def load(target: str, place: Path) -> CocoIndex:
    return CocoIndex.from_source(read_source(target, place, "train"), need_boxes=True)


def use(index: CocoIndex) -> tuple[Targets, int]:
    """Do all that a run does; return targets by picture, and how many could not be read."""
    assert all("\n" not in line for line in index.notices)
    json.loads(json.dumps(index.data_report()))
    index.report(num_queries=1)
    assert len(index.coco_gt.getAnnIds()) == len(index.annotations.ids)
    dataset = CocoDetection(index, PLAIN)
    found: Targets = {}
    unreadable = 0
    for i, name in enumerate(index.images.file_names):
        item = dataset[i]
        if isinstance(item, UnreadableImage):
            unreadable += 1
            continue
        labels, boxes = item[1]["labels"].tolist(), item[1]["boxes"].tolist()
        pairs = [(dataset.classes.names[k], box) for k, box in zip(labels, boxes, strict=True)]
        found[Path(name).stem] = sorted(pairs)
    return found, unreadable


def picture_file(target: str, place: Path, number: int) -> Path:
    folder = {"coco": "train2017", "voc": "JPEGImages", "yolo": "images/train"}[target]
    return place / folder / f"p{number}.png"


def remove_picture(target: str, place: Path, number: int) -> Counter[str]:
    picture_file(target, place, number).unlink()
    return Counter() if target == "yolo" else Counter(missing_picture=1)


def cut_picture(target: str, place: Path, number: int) -> Counter[str]:
    file = picture_file(target, place, number)
    file.write_bytes(file.read_bytes()[:60])
    return Counter(unreadable=1)


def replace_picture(target: str, place: Path, number: int) -> Counter[str]:
    picture_file(target, place, number).write_text("no picture")
    if target == "yolo":
        return Counter(unreadable=1, size_unknown=1, unreadable_picture=1)
    return Counter(unreadable=1)


def in_json(kind: str, change: Callable[[Content, Content, Content], object], **more: int) -> Any:
    """Return a flaw that changes (content, image, its first annotation) of a COCO file."""

    def flaw(target: str, place: Path, number: int) -> Counter[str]:
        file = place / "annotations" / "instances_train2017.json"
        content = json.loads(file.read_bytes())
        image = next(i for i in content["images"] if i.get("file_name") == f"p{number}.png")
        own = (a for a in content["annotations"] if isinstance(a, dict))
        annotation = next(a for a in own if a["image_id"] == image["id"])
        change(content, image, annotation)
        file.write_text(json.dumps(content))
        return Counter({kind: 1, **more})

    return flaw


def in_text(folder: str, suffix: str, kind: str, old: str, new: str, **more: int) -> Any:
    """Return a flaw that replaces text in a picture's annotation file, once."""

    def flaw(target: str, place: Path, number: int) -> Counter[str]:
        file = place / folder / f"p{number}{suffix}"
        text = file.read_text()
        start = old.format(x=2 + number + 1)
        assert start in text
        file.write_text(text.replace(start, new, 1))
        return Counter({kind: 1, **more})

    return flaw


def voc(kind: str, old: str, new: str, **more: int) -> Any:
    return in_text("Annotations", ".xml", kind, old, new, **more)


def yolo(kind: str, new: str, **more: int) -> Any:
    return in_text("labels/train", ".txt", kind, "0 ", new + "\n0 ", **more)


def drop_file(folder: str, suffix: str, kind: str | None) -> Any:
    def flaw(target: str, place: Path, number: int) -> Counter[str]:
        (place / folder / f"p{number}{suffix}").unlink()
        return Counter({kind: 1}) if kind else Counter(no_boxes=1)

    return flaw


BROKEN: list[object] = [None, [1, 2, 3], [1, 2, float("nan"), 4], [1, 2, "3", 4], {}, 7]


def set_bbox(box: object, content: Content, image: Content, annotation: Content) -> None:
    annotation["bbox"] = box


COMMON = [remove_picture, cut_picture, replace_picture]
FLAWS: dict[str, list[Any]] = {
    "coco": [
        *COMMON,
        *(in_json("broken_bbox", partial(set_bbox, box))
          for box in BROKEN),
        in_json("flat_bbox", lambda c, i, a: a.update(bbox=[5, 5, 0, 3])),
        in_json("flat_bbox", lambda c, i, a: a.update(bbox=[5, 5, 4, -3])),
        in_json("outside_bbox", lambda c, i, a: a.update(bbox=[50, 5, 4, 3])),
        in_json("clipped_bbox", lambda c, i, a: a.update(bbox=[30, 5, 40, 3])),
        in_json("unknown_image_id", lambda c, i, a: a.update(image_id=777)),
        in_json("unknown_category_id", lambda c, i, a: a.update(category_id="3")),
        in_json("not_an_object", lambda c, i, a: c["annotations"].append([1])),
        in_json("repeated_image", lambda c, i, a: c["images"].append(i)),
        in_json("outside_folder", lambda c, i, a: i.update(file_name="../x"), unknown_image_id=2),
        in_json("no_file_name", lambda c, i, a: i.pop("file_name"), unknown_image_id=2),
        in_json("no_image_id", lambda c, i, a: i.update(id=None), unknown_image_id=2),
        in_json("filled_in", lambda c, i, a: a.pop("area")),
        in_json("filled_in", lambda c, i, a: a.update(iscrowd="no")),
        in_json("size_not_stated", lambda c, i, a: i.pop("width")),
        in_json("other_size", lambda c, i, a: i.update(width=WIDTH + 9)),
    ],
    "voc": [
        *COMMON,
        voc("damaged_xml", "</size>", "</sise>"),
        voc("broken_bbox", "<xmin>{x}</xmin>", "<xmin>left</xmin>", filled_in=1),
        voc("broken_bbox", "<xmin>{x}</xmin>", "", filled_in=1),
        voc("flat_bbox", "<xmin>{x}</xmin>", "<xmin>39</xmin>", filled_in=1),
        voc("outside_bbox", "<xmin>{x}</xmin>", "<xmin>45</xmin><xmax>49</xmax>"),
        voc("unknown_category_id", "<name>cat</name>", "<name> </name>"),
        voc("size_not_stated", "<width>40</width>", "<width>wide</width>"),
        voc("other_size", "<width>40</width>", "<width>49</width>"),
        drop_file("Annotations", ".xml", "missing_xml"),
    ],
    "yolo": [
        *COMMON,
        *(yolo("malformed_line", line) for line in ("cat 1 2 3 4", "0 0.5", "0.5 0 0 1 1", "inf")),
        yolo("broken_bbox", "0 nan 0.5 0.1 0.1"),
        yolo("flat_bbox", "0 0.5 0.5 0 0.1"),
        yolo("outside_bbox", "0 5 0.5 0.1 0.1"),
        yolo("unknown_category_id", "9 0.5 0.5 0.1 0.1"),
        drop_file("labels/train", ".txt", None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("target", FORMATS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flaws_are_counted_and_sound_pictures_unaffected(
    tmp_path_factory: pytest.TempPathFactory, target: str, data: st.DataObject
) -> None:
    place = write_sound(tmp_path_factory.mktemp("set"), target)
    expected, unreadable = use(load(target, place))
    assert unreadable == 0
    assert len(expected) == NUM_PICTURES
    chosen = data.draw(st.lists(st.integers(0, len(FLAWS[target]) - 1), max_size=4), label="flaws")
    counts: Counter[str] = Counter()
    for number, flaw in enumerate(chosen, 1):
        counts += FLAWS[target][flaw](target, place, number)
    index = load(target, place)
    found, unreadable = use(index)
    gone = counts.pop("missing_picture", 0)
    assert unreadable == counts.pop("unreadable", 0) + gone
    told = Counter({finding.kind: finding.count for finding in index.findings})
    assert told.pop("missing_picture", 0) == gone
    assert told.pop("no_boxes", 0) >= counts.pop("no_boxes", 0)  # other flaws take boxes too
    assert {kind: told[kind] for kind in counts} == dict(counts)
    assert set(told) == set(counts)
    for number in (0, *range(len(chosen) + 1, NUM_PICTURES)):
        assert found[f"p{number}"] == expected[f"p{number}"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_in_a_coco_file_is_told_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: object
) -> None:
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "p0.png").exists():
        for image in SOUND["images"]:
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / image["file_name"])
    content = json.loads(json.dumps(SOUND))
    section = data.draw(st.sampled_from(["images", "annotations", "categories", None]))
    if section is None:
        content[data.draw(st.sampled_from(sorted(content)))] = value
    else:
        entry = data.draw(st.integers(0, len(content[section]) - 1))
        key = data.draw(st.sampled_from([None, *content[section][entry]]))
        if key is None:
            content[section][entry] = value
        else:
            content[section][entry][key] = value
    try:
        use(CocoIndex.from_source(Source(content, folder, folder), need_boxes=True))
    except DataError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal


@pytest.mark.parametrize("target", FORMATS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), junk=st.binary(max_size=8))
def test_any_bytes_in_annotation_files_are_told_or_refused(
    tmp_path_factory: pytest.TempPathFactory, target: str, data: st.DataObject, junk: bytes
) -> None:
    place = write_sound(tmp_path_factory.mktemp("set"), target)
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix != ".png")
    file = data.draw(st.sampled_from(files))
    raw = file.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = start + data.draw(st.sampled_from([0, 1, 5, 10**9]))
    file.write_bytes(raw[:start] + junk + raw[end:])
    try:
        use(load(target, place))
    except DataError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
