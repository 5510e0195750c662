"""Faulty annotation files: refused in one line that says where, or repaired with a notice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.arrays import Names
from datasets.checks.findings import Finding
from datasets.index import CocoIndex
from util.errors import DataError

Content = dict[str, Any]
Write = Callable[[Content], tuple[Path, Path]]
Change = Callable[[Content], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "a list `images`"),
        (lambda c: c.pop("annotations"), "a list `annotations`"),
        (lambda c: c.pop("categories"), "a list `categories`"),
        (lambda c: c["categories"].clear(), "at least one entry in `categories`"),
        (lambda c: c["images"].clear(), "at least one entry in `images`"),
        (
            lambda c: [i.pop("file_name") for i in c["images"]],
            "one usable image in `images`, got none. Noticed: images without a file_name",
        ),
        (lambda c: c["categories"][1].update(id="x"), "category at position 1: .* got 'x'"),
        (lambda c: c["categories"][1].update(id=7), "category id 7 occurs twice"),
        (lambda c: c["annotations"].clear(), "at least one usable box"),
        (
            lambda c: [a.update(bbox=[0.1, 0.2, 0.5, 0.25]) for a in c["annotations"]],
            "in pixels, got values from 0 to 1",
        ),
        (
            lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
            "at least one usable box",
        ),
    ],
)
def test_faults_are_refused_in_one_line(
    content: Content, write: Write, change: Change, message: str
) -> None:
    json_path, folder = write(content)
    change(content)
    json_path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        CocoIndex.load(json_path, folder, need_boxes=True)
    assert "\n" not in str(caught.value)
    assert str(json_path) in str(caught.value)


def test_files_that_are_not_json_or_not_there(content: Content, write: Write) -> None:
    json_path, folder = write(content)
    with pytest.raises(DataError, match="expected a folder of images"):
        CocoIndex.load(json_path, folder / "nowhere", need_boxes=True)
    with pytest.raises(DataError, match="found none"):
        CocoIndex.load(folder / "none.json", folder, need_boxes=True)
    json_path.write_text('{"images": [],\n "annotations": oops}')
    with pytest.raises(DataError, match="line 2 column 17"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    json_path.write_text("[1, 2]")
    with pytest.raises(DataError, match="JSON object, got a list"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    json_path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    json_path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="JSON of a data set"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    with pytest.raises(DataError, match="expected a COCO-format JSON file"):
        CocoIndex.load(folder, folder, need_boxes=True)


def test_test_dev_files_need_no_annotations(content: Content, write: Write) -> None:
    del content["annotations"]
    index = CocoIndex.load(*write(content), need_boxes=False)
    assert len(index) == 3
    assert index.notices == []
    assert len(index.annotations.ids) == 0


def test_evaluation_tells_of_images_without_boxes(content: Content, write: Write) -> None:
    del content["annotations"][1:]
    index = CocoIndex.load(*write(content), need_boxes=False)
    assert index.notices == ["images without boxes: 2 of 3, kept"]


@pytest.mark.parametrize(
    ("change", "notice", "boxes", "evaluated"),
    [
        ({"bbox": [1, 2, 3]}, "not four finite numbers", 2, 2),
        ({"bbox": [1, 2, float("nan"), 4]}, "not four finite numbers", 2, 2),
        ({"bbox": [1, 2, "3", 4]}, "not four finite numbers", 2, 2),
        ({"bbox": None}, "not four finite numbers", 2, 2),
        ({"bbox": [1, 2, 0, 4]}, "without width or height", 2, 2),
        ({"bbox": [10, 10, -5, 4]}, "without width or height", 2, 2),
        ({"bbox": [50, 3, 5, 4]}, "outside its image", 2, 3),
        ({"bbox": [30, 20, 20, 20]}, "reaches past its image", 3, 3),
        ({"bbox": [35.5, 25, 5, 5]}, None, 3, 3),
        ({"iscrowd": 1}, "images without boxes: 1 of 3", 2, 3),
    ],
)
def test_unusable_boxes_are_dropped_and_named(
    content: Content,
    write: Write,
    change: Content,
    notice: str | None,
    boxes: int,
    evaluated: int,
) -> None:
    content["annotations"][0].update(change)
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert len(index.boxes) == boxes
    assert len(index.annotations.ids) == evaluated
    if notice is None:
        assert index.notices == []
    else:
        assert notice in index.notices[0]
        if "images" not in notice:
            assert "1 box (annotation 0 of image 5 '5.png')" in index.notices[0]


@pytest.mark.parametrize(("past", "told"), [(9, False), (12, True)])
def test_many_boxes_past_their_images_raise_a_doubt(
    content: Content, write: Write, past: int, told: bool
) -> None:
    content["annotations"] += [
        {**content["annotations"][0], "id": 10 + i, "bbox": [30, 20, 20, 20]} for i in range(past)
    ]
    (notice,) = CocoIndex.load(*write(content), need_boxes=True).notices
    assert ("may be corners" in notice) == told


def test_a_notice_names_three_boxes_at_most(content: Content, write: Write) -> None:
    content["annotations"] += [
        {**content["annotations"][0], "id": 10 + i, "bbox": [1, 1, 0, 0]} for i in range(5)
    ]
    (notice,) = CocoIndex.load(*write(content), need_boxes=True).notices
    assert "5 boxes (annotation 10 of image 5 '5.png'" in notice
    assert notice.count("annotation ") == 3
    assert notice.endswith(", ...)")


def test_missing_ids_areas_and_sizes_are_filled_in(content: Content, write: Write) -> None:
    for annotation in content["annotations"]:
        del annotation["id"]
    for annotation in content["annotations"][::2]:
        del annotation["area"], annotation["iscrowd"]
    for image in content["images"][:2]:
        del image["width"], image["height"]
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.images.sizes.tolist() == [[30, 40]] * 3
    assert any("without an id" in notice for notice in index.notices)
    assert any("without a valid area of 2, iscrowd of 2" in notice for notice in index.notices)
    assert any(
        "without width and height, read from the files: 2" in notice for notice in index.notices
    )
    assert index.annotations.area.tolist() == [120, 600, 12]


def test_missing_and_resized_images_are_noticed(content: Content, write: Write) -> None:
    json_path, folder = write(content)
    (folder / "9.png").unlink()
    content["images"][0]["width"] = 41
    json_path.write_text(json.dumps(content))
    missing, resized = CocoIndex.load(json_path, folder, need_boxes=True).notices
    assert missing.startswith("images not in the folder: 1 of 3, not trained on, missed in eval")
    assert "'9.png'" in missing
    assert "1 of 2 checked ('5.png')" in resized
    for name in ("5.png", "2.png"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"5\.png: expected an image, found none"):
        CocoIndex.load(json_path, folder, need_boxes=True)


@pytest.mark.parametrize("entry", [None, 3, []])
def test_annotations_of_another_kind_are_left_out(
    content: Content, write: Write, entry: object
) -> None:
    content["annotations"].insert(0, entry)
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.notices == ["annotations that are not objects, left out: 1 (position 0)"]
    assert index.annotations.ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "kind", "ids", "left"),
    [
        (lambda c: c["images"][1].update(id="9"), "no_image_id", [], [5, 2]),
        (lambda c: c["images"][1].pop("file_name"), "no_file_name", [9], [5, 2]),
        (lambda c: c["images"][1].update(file_name="../9.png"), "outside_folder", [9], [5, 2]),
        (lambda c: c["images"][1].update(file_name="/etc/9.png"), "outside_folder", [9], [5, 2]),
        (lambda c: c["images"][1].update(file_name="a/../9.png"), "outside_folder", [9], [5, 2]),
        (lambda c: c["images"][1].update(file_name="\0"), "outside_folder", [9], [5, 2]),
        (lambda c: c["images"].append(c["images"][1]), "repeated_image", [9], [5, 9, 2]),
        (
            lambda c: c["images"].append({**c["images"][1], "file_name": "5.png"}),
            "repeated_image", [9], [5, 2],
        ),
    ],
)  # fmt: skip
def test_images_that_cannot_be_told_apart_or_lie_outside_are_left_out(
    content: Content, write: Write, change: Change, kind: str, ids: list[int], left: list[int]
) -> None:
    json_path, folder = write(content)
    change(content)
    json_path.write_text(json.dumps(content))
    index = CocoIndex.load(json_path, folder, need_boxes=True)
    assert index.images.ids.tolist() == left
    assert index.findings[0].kind == kind
    assert index.findings[0].ids.tolist() == ids
    lost = [finding for finding in index.findings if finding.kind == "unknown_image_id"]
    assert [finding.ids.tolist() for finding in lost] == ([] if 9 in left else [[1]])
    assert index.annotations.ids.tolist() == ([0, 1, 2] if 9 in left else [0, 2])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"image_id": 77},
            "whose image_id is not of usable images, left out: 1 (annotation 1: 77)",
        ),
        ({"image_id": [9]}, "(annotation 1: [9])"),
        ({"category_id": None}, "whose category_id is not of usable categories, left out: 1"),
    ],
)
def test_annotations_of_no_image_or_class_are_left_out(
    content: Content, write: Write, change: Content, text: str
) -> None:
    content["annotations"][1].update(change)
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert text in index.notices[0]
    assert index.annotations.ids.tolist() == [0, 2]


@pytest.mark.parametrize("number", [0, None, 2**63])
def test_annotations_without_an_id_of_their_own_are_numbered(
    content: Content, write: Write, number: object
) -> None:
    content["annotations"][1]["id"] = number
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.notices[0].startswith("annotations without an id of their own: 1, all were")
    assert index.annotations.ids.tolist() == [1, 2, 3]


def test_data_report_lists_every_kind_with_its_ids(content: Content, write: Write) -> None:
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    content["annotations"][1]["image_id"] = 77
    index = CocoIndex.load(*write(content), need_boxes=True)
    report = json.loads(json.dumps(index.data_report()))
    assert (report["images"], report["boxes"]) == (3, 1)
    found = [(f["kind"], f.get("annotation_ids", f.get("image_ids"))) for f in report["findings"]]
    assert found == [
        ("unknown_image_id", [1]), ("flat_bbox", [0]), ("no_boxes", [5, 9]),
    ]  # fmt: skip


def test_findings_survive_being_written(content: Content, write: Write) -> None:
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    finding = CocoIndex.load(*write(content), need_boxes=True).findings[0]
    assert finding.to_json() == {
        "kind": "flat_bbox", "count": 1, "text": finding.text, "annotation_ids": [0],
    }  # fmt: skip
    assert Finding.from_json(finding.to_json()).to_json() == finding.to_json()


@given(st.lists(st.text() | st.just("\ud800")))
def test_names_come_out_as_they_went_in(strings: list[str]) -> None:
    names = Names.of(strings)
    assert list(names) == strings
    assert len(names) == len(strings)
    if strings:
        assert names[-1] == strings[-1]
        assert names[np.int64(0)] == strings[0]


def test_odd_area_and_crowd_flags_are_replaced_and_told(content: Content, write: Write) -> None:
    content["annotations"][0] |= {"area": -5, "iscrowd": "0"}
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.annotations.area.tolist() == [120, 600, 12]
    assert not index.annotations.crowd.any()
    assert any("valid area of 1, iscrowd of 1" in notice for notice in index.notices)


def test_categories_without_a_name_go_by_their_id(content: Content, write: Write) -> None:
    content["categories"] = [{"id": 7, "name": ""}, {"id": 3, "name": None}]
    assert CocoIndex.load(*write(content), need_boxes=True).classes.names == ("3", "7")


def test_whole_numbers_with_a_point_are_ids(content: Content, write: Write) -> None:
    """Tables with a gap in a column write all of it so."""
    for entry in (*content["images"], *content["categories"], *content["annotations"]):
        entry.update({key: float(entry[key]) for key in entry if key == "id" or key[-3:] == "_id"})
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.findings == ()
    assert index.images.ids.tolist() == [5, 9, 2]
    assert index.classes.ids == (3, 7)
    content["images"][0]["id"] = 5.5
    (no_id, *_) = CocoIndex.load(*write(content), need_boxes=True).findings
    assert no_id.kind == "no_image_id"


def test_links_to_nowhere_and_folders_are_missing_images(content: Content, write: Write) -> None:
    json_path, folder = write(content)
    (folder / "5.png").rename(folder / "real")
    (folder / "5.png").symlink_to(folder / "real")
    (folder / "9.png").unlink()
    (folder / "9.png").symlink_to(folder / "gone")
    (folder / "2.png").unlink()
    (folder / "2.png").mkdir()
    missing, *_ = CocoIndex.load(json_path, folder, need_boxes=True).findings
    assert (missing.kind, missing.ids.tolist()) == ("missing_image", [9, 2])


def test_names_with_backslashes_get_advice(content: Content, write: Write) -> None:
    json_path, folder = write(content)
    for image in content["images"]:
        image["file_name"] = "train\\" + image["file_name"]
    json_path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"found none; .* Write / where it has "):
        CocoIndex.load(json_path, folder, need_boxes=True)
