"""Faulty annotation files: refused in one line that says where, or repaired with a notice."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.arrays import Names
from datasets.checks.findings import Notice
from datasets.index import CocoIndex
from util.errors import DataError

Content = dict[str, Any]
Write = Callable[[Content], tuple[Path, Path]]
Change = Callable[[Content], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "there is no list `images`"),
        (lambda c: c.pop("annotations"), "there is no list `annotations`"),
        (lambda c: c.pop("categories"), "there is no list `categories`"),
        (lambda c: c["categories"].clear(), "`categories` is empty"),
        (lambda c: c["images"].clear(), "`images` is empty"),
        (
            lambda c: [i.pop("file_name") for i in c["images"]],
            "no image in `images` can be used. Found: images without a file name: 3",
        ),
        (
            lambda c: c["categories"][1].update(id=" "),
            r"categories\[1\] has id ' '\. Every category needs",
        ),
        (
            lambda c: c["categories"][1].update(id=7),
            r"categories\[1\] has id 7\. Every category needs",
        ),
        (lambda c: c["annotations"].clear(), "none of the 0 annotations is a usable box"),
        (
            lambda c: [a.update(bbox=[0.1, 0.2, 0.5, 0.25]) for a in c["annotations"]],
            "boxes are fractions from 0 to 1",
        ),
        (
            lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
            "none of the 3 annotations is a usable box",
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
    with pytest.raises(DataError, match="no such folder of images"):
        CocoIndex.load(json_path, folder / "nowhere", need_boxes=True)
    with pytest.raises(DataError, match="none.json: no such COCO-format JSON file"):
        CocoIndex.load(folder / "none.json", folder, need_boxes=True)
    json_path.write_text('{"images": [],\n "annotations": oops}')
    with pytest.raises(DataError, match="line 2 column 17"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    json_path.write_text("[1, 2]")
    with pytest.raises(DataError, match="must hold a JSON object, not a list"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    json_path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    json_path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="not the JSON of a data set"):
        CocoIndex.load(json_path, folder, need_boxes=True)
    with pytest.raises(DataError, match="cannot be read as a COCO-format JSON file"):
        CocoIndex.load(folder, folder, need_boxes=True)


def test_test_dev_files_need_no_annotations(content: Content, write: Write) -> None:
    del content["annotations"]
    index = CocoIndex.load(*write(content), need_boxes=False)
    assert len(index) == 3
    assert index.notices == []
    assert len(index.annotations.ids) == 0


def test_evaluation_reports_images_without_boxes(content: Content, write: Write) -> None:
    del content["annotations"][1:]
    index = CocoIndex.load(*write(content), need_boxes=False)
    assert index.notices == [
        "images without boxes: 2 of 3 ('9.png', '2.png'); "
        "training keeps them, as examples of background"
    ]


@pytest.mark.parametrize(
    ("change", "notice", "boxes", "evaluated"),
    [
        ({"bbox": [1, 2, 3]}, "broken boxes", 2, 2),
        ({"bbox": [1, 2, float("nan"), 4]}, "broken boxes", 2, 2),
        ({"bbox": [1, 2, "3 px", 4]}, "broken boxes", 2, 2),
        ({"bbox": None}, "broken boxes", 2, 2),
        ({"bbox": [1, 2, 0, 4]}, "boxes without width or height", 2, 2),
        ({"bbox": [10, 10, -5, 4]}, "boxes of negative width or height", 2, 2),
        ({"bbox": [50, 3, 5, 4]}, "boxes outside their image", 2, 3),
        ({"bbox": [30, 20, 20, 20]}, "boxes that extend past their image", 3, 3),
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
            assert ": 1 ('5.png' annotation 0 " in index.notices[0]


@pytest.mark.parametrize(
    ("past", "kinds"),
    [(5, {"past_edge": 5}), (12, {"cxcywh_bbox": 15, "past_edge": 1})],  # the whole image is one
)
def test_many_boxes_past_their_images_are_a_warning(
    content: Content, write: Write, past: int, kinds: dict[str, int]
) -> None:
    content["annotations"] += [
        {**content["annotations"][0], "id": 10 + i, "bbox": [30, 20, 20, 20]} for i in range(past)
    ]
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert {notice.kind: notice.count for notice in index.findings} == kinds
    assert ("takes them as corners: every box is shifted" in index.notices[0]) == (past == 12)
    assert index.annotations.xywh[-1].tolist() == [30, 20, 20, 20]  # as the file says
    assert index.boxes[index.first[1] - 1].tolist() == [30, 20, 40, 30]


def test_a_notice_names_three_boxes_at_most(content: Content, write: Write) -> None:
    content["annotations"] += [
        {**content["annotations"][0], "id": 10 + i, "bbox": [1, 1, 0, 0]} for i in range(5)
    ]
    (notice,) = CocoIndex.load(*write(content), need_boxes=True).notices
    assert ": 5 ('5.png' annotation 10 [1, 1, 0, 0]" in notice
    assert notice.count("annotation ") == 3
    assert notice.endswith(", ...); training skips them")


def test_missing_ids_areas_and_sizes_are_filled_in(content: Content, write: Write) -> None:
    for annotation in content["annotations"]:
        del annotation["id"]
    for annotation in content["annotations"][::2]:
        del annotation["area"], annotation["iscrowd"]
    for image in content["images"][:2]:
        del image["width"], image["height"]
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.images.sizes.tolist() == [[30, 40]] * 3
    assert {notice.kind: notice.count for notice in index.findings} == {
        "no_annotation_id": 3,
        "missing_key": 2,
        "size_not_stated": 2,
    }
    assert "annotation 1 area, iscrowd" in index.notices[1]
    assert "images without width and height: 2 of 3" in index.notices[2]
    assert index.annotations.area.tolist() == [120, 600, 12]


def test_unreadable_images_are_counted_among_those_that_were_opened(
    content: Content, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.checks.images._SIZES_CHECKED", 2)  # two of four
    more = ({**content["images"][0], "id": i, "file_name": f"{i}.png"} for i in (11, 12))
    content["images"] += more
    json_path, folder = write(content)
    first, second, *_ = (folder / image["file_name"] for image in content["images"])
    first.unlink()
    second.write_text("no image")
    notices = CocoIndex.load(json_path, folder, need_boxes=False).notices
    assert any(notice.startswith("missing images: 1 of 5 (") for notice in notices)
    assert any(notice.startswith("unreadable images: 1 of 2 checked (") for notice in notices)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("need_boxes", [True, False])
def test_a_set_of_which_no_image_can_be_read_is_refused(
    content: Content, write: Write, monkeypatch: pytest.MonkeyPatch, need_boxes: bool
) -> None:
    """As after a clone without Git LFS: not an image in a hundred would show all of it."""
    monkeypatch.setattr("datasets.checks.images._SIZES_CHECKED", 1)
    json_path, folder = write(content)
    names = [image["file_name"] for image in content["images"]]
    for name in names:
        (folder / name).write_text(POINTER)
    with pytest.raises(
        DataError, match=r"5\.png: is a Git LFS pointer\. Run .* Nor can any other of the 3 images"
    ):
        CocoIndex.load(json_path, folder, need_boxes=need_boxes)
    (folder / names[0]).write_text("no image")
    with pytest.raises(DataError, match=r"5\.png: cannot be read: not an image of a known format"):
        CocoIndex.load(json_path, folder, need_boxes=need_boxes)
    (folder / names[0]).write_text(POINTER)
    Image.new("RGB", (40, 30)).save(folder / names[1])
    (notice,) = (
        finding.text
        for finding in CocoIndex.load(json_path, folder, need_boxes=need_boxes).findings
        if finding.kind == "unreadable_image"
    )
    assert notice.startswith("unreadable images: 2 of 3 ('5.png' is a Git LFS pointer. Run `git")


def test_images_that_are_missing_are_not_said_to_be_unreadable(
    content: Content, write: Write
) -> None:
    json_path, folder = write(content)
    first, *others = (folder / image["file_name"] for image in content["images"])
    first.write_text(POINTER)
    for path in others:
        path.unlink()
    with pytest.raises(DataError, match=r"to fetch the file\.$"):
        CocoIndex.load(json_path, folder, need_boxes=False)


def test_one_wrong_size_causes_every_size_to_be_compared_and_reported(
    content: Content,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("datasets.checks.images._SIZES_CHECKED", 1)  # the first
    json_path, folder = write(content)
    for image in content["images"][::2]:
        image["width"] = 41
    json_path.write_text(json.dumps(content))
    index = CocoIndex.load(json_path, folder, need_boxes=True)
    assert index.images.sizes.tolist() == [[30, 40]] * 3
    assert "2 of 3 checked ('5.png' stated 41 x 30, is 40 x 30, " in index.notices[0]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("1 of 1 images looked at are of another size than stated: reading the "
                         "headers of all 3")  # fmt: skip


def test_missing_and_resized_images_are_noticed(content: Content, write: Write) -> None:
    json_path, folder = write(content)
    (folder / "9.png").unlink()
    content["images"][0]["width"] = 41
    json_path.write_text(json.dumps(content))
    missing, resized = CocoIndex.load(json_path, folder, need_boxes=True).notices
    assert missing.startswith("missing images: 1 of 3")
    assert missing.endswith("training skips them; in evaluation their boxes count as missed")
    assert "'9.png'" in missing
    assert "1 of 2 checked ('5.png' stated 41 x 30, is 40 x 30)" in resized
    for name in ("5.png", "2.png"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"5\.png: no such image, nor any other of the 3"):
        CocoIndex.load(json_path, folder, need_boxes=True)


@pytest.mark.parametrize("entry", [None, 3, []])
def test_annotations_of_another_kind_are_left_out(
    content: Content, write: Write, entry: object
) -> None:
    content["annotations"].insert(0, entry)
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.notices == [
        f"annotations that are not objects: 1 ('annotations[0]' {entry!r}); training skips them"
    ]
    assert index.annotations.ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "kind", "ids", "left"),
    [
        (lambda c: c["images"][1].update(id=[9]), "no_image_id", [], [5, 2]),
        (lambda c: c["images"][1].pop("file_name"), "no_file_name", [9], [5, 2]),
        (lambda c: c["images"][1].update(file_name="../8.png"), "outside_folder", [9], [5, 2]),
        (lambda c: c["images"][1].update(file_name="/etc/8.png"), "outside_folder", [9], [5, 2]),
        (lambda c: c["images"][1].update(file_name="a/../8.png"), "outside_folder", [9], [5, 2]),
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
    assert index.findings[0].to_json().get("image_ids", []) == ids
    lost = [finding for finding in index.findings if finding.kind == "unknown_image_id"]
    # Boxes that are lost with their image are not reported again.
    assert [finding.to_json()["annotation_ids"] for finding in lost] == (
        [[1]] if kind == "no_image_id" else []
    )
    assert index.annotations.ids.tolist() == ([0, 1, 2] if 9 in left else [0, 2])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"image_id": 77},
            "annotations of unknown images: 1 ('annotations[1]' annotation 1 image_id 77)",
        ),
        ({"image_id": [9]}, "annotation 1 image_id [9])"),
        (
            {"category_id": None},
            "annotations of unknown categories: 1 ('9.png' annotation 1 category_id None)",
        ),
    ],
)
def test_annotations_of_no_image_or_class_are_left_out(
    content: Content, write: Write, change: Content, text: str
) -> None:
    content["annotations"][1].update(change)
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert text in index.notices[0]
    assert index.annotations.ids.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("ids", "used", "expected"),
    [
        ([1, 2], [0, 1, 0], "ids from 0 to 1, categories from 1 to 2: each one less?"),
        ([0, 1], [1, 2, 1], "ids from 1 to 2, categories from 0 to 1: each one more?"),
        ([1], [1, 0, 0], ""),  # 1 would be 2
        ([1, 2], [1, 2, 1], ""),
        ([1, 2], [1, 2, 5], ""),
        ([1, 2, 4], [1, 2, 3], ""),  # a class that is missing
    ],
)
def test_category_ids_that_seem_to_be_one_off_are_reported(
    content: Content, write: Write, ids: list[int], used: list[int], expected: str
) -> None:
    content["categories"] = [{"id": i, "name": f"class {i}"} for i in ids]
    for annotation, category in zip(content["annotations"], used, strict=True):
        annotation["category_id"] = category
    index = CocoIndex.load(*write(content), need_boxes=True)
    found = {finding.kind: finding.text for finding in index.findings}
    assert ("shifted_category" in found) == bool(expected)
    assert expected in found.get("shifted_category", "")
    assert len(index.boxes) == sum(i in ids for i in used), "they are taken as they are"


@pytest.mark.parametrize("number", [0, None, 2**63])
def test_annotations_without_an_id_of_their_own_are_numbered(
    content: Content, write: Write, number: object
) -> None:
    content["annotations"][1]["id"] = number
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.findings[0].to_json() == {
        "kind": "repeated_annotation" if number == 0 else "no_annotation_id",
        "count": 1,
        "text": index.notices[0],
        "places": ["annotations[1]"],
    }
    assert index.annotations.ids.tolist() == [0, 1, 2]  # 1 is the first that is not in use


def test_data_report_lists_every_kind_with_its_ids(content: Content, write: Write) -> None:
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    content["annotations"][1]["image_id"] = 77
    index = CocoIndex.load(*write(content), need_boxes=True)
    report = json.loads(json.dumps(index.data_report()))
    assert (report["images"], report["boxes"]) == (3, 1)
    found = [(f["kind"], f.get("annotation_ids", f.get("image_ids"))) for f in report["findings"]]
    assert found == [
        ("unknown_image_id", [1]), ("zero_bbox", [0]), ("no_boxes", [5, 9]),
    ]  # fmt: skip


def test_data_report_counts_all_and_lists_a_thousand(content: Content, write: Write) -> None:
    sound, *_ = content["annotations"]
    content["annotations"] = [sound | {"id": i} for i in range(2000)]
    content["annotations"] += [{**sound, "id": 3000 + i, "bbox": [2, 2, 0, 0]} for i in range(1500)]
    content["annotations"] += [None] * 1200
    report = CocoIndex.load(*write(content), need_boxes=True).data_report()
    counts = {f["kind"]: f["count"] for f in report["findings"]}
    assert counts == {"not_an_object": 1200, "zero_bbox": 1500, "no_boxes": 2}
    lists = [f.get("places", f.get("annotation_ids")) for f in report["findings"][:2]]
    assert lists == [
        [f"annotations[{3500 + i}]" for i in range(1000)],
        [3000 + i for i in range(1000)],
    ]


def test_findings_survive_being_written(content: Content, write: Write) -> None:
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    finding = CocoIndex.load(*write(content), need_boxes=True).findings[0]
    assert finding.to_json() == {
        "kind": "zero_bbox", "count": 1, "text": finding.text, "annotation_ids": [0],
    }  # fmt: skip
    assert Notice(**json.loads(json.dumps(asdict(finding)))) == finding


@given(st.lists(st.text() | st.just("\ud800")))
def test_names_come_out_as_they_went_in(strings: list[str]) -> None:
    names = Names.of(strings)
    assert list(names) == strings
    assert len(names) == len(strings)
    if strings:
        assert names[-1] == strings[-1]
        assert names[np.int64(0)] == strings[0]


def test_invalid_area_and_crowd_flags_are_replaced_and_reported(
    content: Content, write: Write
) -> None:
    content["annotations"][0] |= {"area": -5, "iscrowd": "no"}
    index = CocoIndex.load(*write(content), need_boxes=True)
    assert index.annotations.area.tolist() == [120, 600, 12]
    assert not index.annotations.crowd.any()
    assert any("annotation 0 area, iscrowd" in notice for notice in index.notices)


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
    assert (missing.kind, missing.to_json()["image_ids"]) == ("missing_image", [9, 2])
