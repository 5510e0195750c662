"""Saved detections: read, refused in one line, and evaluated without a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import main
from datasets.index import CocoIndex
from engine.evaluation.detections import read_detections
from engine.evaluation.matching import Truth
from tests.unit.engine.evaluation.shared import make_coco, truth_of
from util.errors import DataError

GOOD = {"image_id": 4, "category_id": 7, "bbox": [10, 10, 50, 40], "score": 0.5}
TRUTH = truth_of(
    make_coco(
        {
            "images": [{"id": i, "width": 80, "height": 60} for i in (4, 9)],
            "categories": [{"id": 7}, {"id": 90}],
            "annotations": [],
        }
    )
)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def annotations(folder: Path) -> Path:
    """Write annotations of two images; the names of the images are there, not the files."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in (4, 9)],
        "categories": [{"id": 90, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": 0, "image_id": 4, "category_id": 7, "bbox": [10, 10, 50, 40]},
            {"id": 1, "image_id": 9, "category_id": 90, "bbox": [0, 0, 70, 50]},
        ],
    }
    return write(folder / "instances.json", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ({"annotations": []}, "a list of detections is needed"),
        ([{"image_id": 4}, 3], "entry 0: not an object with image_id, category_id"),
        ([{**GOOD, "image_id": " "}], "entry 0: image_id is neither a whole number nor a name"),
        ([{**GOOD, "category_id": True}], "category_id is neither a whole number nor a name"),
        ([{**GOOD, "bbox": [1, 2, 3]}], "bbox is not four finite numbers"),
        (
            [{**GOOD, "bbox": [60, 50, -10, 5]}],
            r"negative .* be \[x, y, width, height\]",
        ),
        ([{**GOOD, "score": float("nan")}], "score is not a finite number"),
        (
            [{**GOOD, "image_id": 5}, {**GOOD, "image_id": 6}, GOOD],
            "2 of 3 image ids are not in the data, such as 5",
        ),
        ([{**GOOD, "image_id": "shot"}], "1 of 1 image ids are not in the data, such as 'shot'"),
        ([{**GOOD, "image_id": 4.5}], "image_id is neither a whole number nor a name"),
        ([{**GOOD, "bbox": [0, 0, 1e200, 1e200]}], "bbox is not four finite numbers"),
        ([{**GOOD, "bbox": [0.1, 0.1, 0.5, 1]}], "between 0 and 1, .* must be in pixels"),
        (["two\nlines"], "entry 0: not an object"),
    ],
)
def test_invalid_detections_are_refused_in_one_line(
    content: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "d.json", content)
    with pytest.raises(DataError, match=message) as caught:
        read_detections(path, TRUTH)
    assert "\n" not in str(caught.value)


def test_other_categories_are_left_out_with_a_notice(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [GOOD, {**GOOD, "category_id": 8}])
    found, notices = read_detections(path, TRUTH)
    assert TRUTH.category_ids[found.category].tolist() == [7]
    assert notices == [
        "1 of 2 detections skipped: their categories (ids 8) are not in the data",
    ]


def test_entries_that_cannot_be_read_are_counted_and_skipped(tmp_path: Path) -> None:
    entries = [GOOD, {**GOOD, "bbox": None}, {**GOOD, "score": 0.25}, {**GOOD, "bbox": [1, 2, 3]},
               {**GOOD, "score": float("inf")}]  # fmt: skip
    found, notices = read_detections(write(tmp_path / "d.json", entries), TRUTH)
    assert found.score.tolist() == [0.5, 0.25]
    (notice,) = notices
    assert notice.startswith(
        "3 of 5 entries skipped: 2 x bbox is not four finite numbers; 1 x score is not a finite "
        "number; the first is entry 1: bbox is not four"
    )


def test_detections_in_other_images_are_counted_and_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [GOOD, GOOD, {**GOOD, "image_id": 5}])
    found, notices = read_detections(path, TRUTH)
    assert len(found) == 2
    assert notices == [
        "1 of 3 detections skipped: 1 image ids are not in the data, such as 5",
    ]


NAMES = ["a/b 1.jpg", "a/0012.png", "b/0012.png", "b/cat.v2.jpg"]
NAMED = replace(
    TRUTH,
    image_ids=np.array([2, 3, 4, 12]),
    file_names=NAMES,
    sizes=np.full((4, 2), 100),
    class_names=["dog", "cat"],
)


@pytest.mark.parametrize(
    ("image_ids", "positions"),
    [
        (["b 1", "cat.v2"], [0, 3]),  # ultralytics: the stem
        (["b 1.jpg", "cat.v2.jpg"], [0, 3]),
        (NAMES, [0, 1, 2, 3]),
        (["a\\0012.png", "b 1"], [-1, 0]),
        (["2", "12", 4], [0, 3, 2]),  # ids as text
        (["2.0", 3], [0, 1]),
        ([3, 4, 2], [1, 2, 0]),
        (["b 1", 12], [0, -1]),  # two files have this stem
    ],
)
def test_images_may_be_named_by_their_files(
    image_ids: list[Any], positions: list[int], tmp_path: Path
) -> None:
    path = write(tmp_path / "d.json", [{**GOOD, "image_id": i} for i in image_ids])
    found, notices = read_detections(path, NAMED)
    assert found.image.tolist() == [p for p in positions if p >= 0]
    by_name = any(isinstance(i, str) and not i.replace(".0", "").isdecimal() for i in image_ids)
    assert any("named by their files" in notice for notice in notices) == by_name
    assert any("skipped" in notice for notice in notices) == (-1 in positions)


def test_stems_that_are_numbers_are_found_where_ids_are_others(tmp_path: Path) -> None:
    """Ultralytics writes int(stem)."""
    truth = replace(NAMED, file_names=["0007.jpg", "000000000139.jpg", "8.jpg", "x.jpg"])
    path = write(tmp_path / "d.json", [{**GOOD, "image_id": i} for i in (139, 7, "x")])
    found, notices = read_detections(path, truth)
    assert found.image.tolist() == [1, 0, 3]
    assert notices == [
        "images are named by their files, not by their ids: 3 of 3 names found, such as 139"
    ]


@pytest.mark.parametrize(
    ("image_ids", "names", "positions", "told"),
    [
        ([2, 3], ["b 1.jpg", "cat.v2.jpg"], [0, 3], True),  # counted from 2, other images
        ([0, 1], ["a/b 1.jpg", "found/cat.v2.jpg"], [0, 3], True),
        ([2, 12], ["b 1.jpg", "cat.v2.jpg"], [0, 3], False),  # both mean the same
        ([2, 3, 4], ["b 1.jpg", "cat.v2.jpg", "gone.jpg"], [0, 3], True),  # ids of all, one name
        ([3, 4], ["0012.png", "0012.png"], [1, 2], False),  # two files are called so
        ([2, 12], ["x.jpg", "y.jpg"], [0, 3], False),
        ([2, 3], ["b 1.jpg", None], [0, 1], False),
        ([2, 3], ["b 1.jpg", 7], [0, 1], False),
    ],
)
def test_a_file_name_beside_the_id_says_which_image_is_meant(
    image_ids: list[int], names: list[Any], positions: list[int], told: bool, tmp_path: Path
) -> None:
    """Numbers of the data that lead to other images would give an AP of nearly 0."""
    entries = [
        {**GOOD, "image_id": number, "file_name": name}
        for number, name in zip(image_ids, names, strict=True)
    ]
    found, notices = read_detections(write(tmp_path / "d.json", entries), NAMED)
    assert found.image.tolist() == positions
    assert any("named by their files, not by their ids" in notice for notice in notices) == told


def test_a_stem_beside_the_id_is_not_read_as_an_id(tmp_path: Path) -> None:
    truth = replace(NAMED, file_names=["4.jpg", "12.jpg", "8.jpg", "x.jpg"])
    entries = [{**GOOD, "image_id": i, "file_name": name} for i, name in enumerate(("4", "12"))]
    found, _ = read_detections(write(tmp_path / "d.json", entries), truth)
    assert found.image.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("ids", "names", "categories", "told"),
    [
        ([7, 90], ["cat", "dog"], [1, 0], "7 is not 'cat' in the data"),  # 7 is dog, 90 cat
        ([0, 1], ["dog", "cat"], [0, 1], "0 is not 'dog' in the data"),
        ([7, 90], ["dog", "cat"], [0, 1], ""),
        ([7, 90], ["Hund", "Katze"], [0, 1], ""),  # of another language
        ([7, 90], ["cat", ""], [0, 1], ""),
    ],
)
def test_a_category_name_beside_the_id_says_which_category_is_meant(
    ids: list[int], names: list[str], categories: list[int], told: str, tmp_path: Path
) -> None:
    entries = [
        {**GOOD, "image_id": 2, "category_id": number, "category_name": name}
        for number, name in zip(ids, names, strict=True)
    ]
    path = write(tmp_path / "d.json", entries)
    found, notices = read_detections(path, NAMED)
    assert found.category.tolist() == categories
    expected = f"categories are taken by their names, not by their ids: {told}"
    assert notices == ([expected] if told else [])
    found, _ = read_detections(path, NAMED, category_ids="as_is")
    assert found.category.tolist() == [NAMED.category_ids.tolist().index(i) for i in ids if i > 1]


def test_names_of_categories_that_are_skipped_are_called_so(tmp_path: Path) -> None:
    entries = [
        {**GOOD, "image_id": 2, "category_id": 7, "category_name": name} for name in ("cat", "Hund")
    ]
    _, notices = read_detections(write(tmp_path / "d.json", entries), NAMED)
    assert notices[-1] == (
        "1 of 2 detections skipped: their categories (names Hund) are not in the data"
    )


def test_numbers_may_be_text_and_categories_names(tmp_path: Path) -> None:
    texts = {"image_id": "2", "category_id": "90", "bbox": ["1", "2", "3.5", "4"], "score": "0.25"}
    path = write(tmp_path / "d.json", [texts, {**GOOD, "image_id": 3, "category_id": "dog"}])
    found, notices = read_detections(path, NAMED)
    assert found.category.tolist() == [1, 0]
    assert found.box[0].tolist() == [1, 2, 3.5, 4]
    assert (found.score.tolist(), notices) == ([0.25, 0.5], [])


def test_text_ids_of_the_data_are_found_as_they_were_written(tmp_path: Path) -> None:
    file = write(
        tmp_path / "text.json",
        {
            "images": [
                {"id": name, "file_name": f"photo{i}.jpg", "width": 100, "height": 80}
                for i, name in enumerate(("0012", "12a", "b"))
            ],
            "categories": [{"id": "k", "name": "kettle"}, {"id": "m", "name": "mug"}],
            "annotations": [
                {"id": i, "image_id": image, "category_id": category, "bbox": [1, 2, 30, 40]}
                for i, (image, category) in enumerate((("0012", "k"), ("12a", "m"), ("b", "m")))
            ],
        },
    )
    truth = Truth.of(CocoIndex.load(file, None, need_boxes=True))
    detections = [
        {"image_id": image, "category_id": category, "bbox": [1, 2, 30, 40], "score": 0.5}
        for image, category in (("b", "m"), ("0012", "k"), ("12a", "m"))
    ]
    found, notices = read_detections(write(tmp_path / "found.json", detections), truth)
    assert notices == []
    again = found.to_coco(truth)
    assert len(again) == 3
    assert all(entry in again for entry in detections)


def objects(ids: list[int], labels: list[int]) -> Truth:
    """Return truth with one object of each of some category ids in each image."""
    return truth_of(
        make_coco(
            {
                "images": [{"id": i, "width": 80, "height": 60} for i in range(len(labels))],
                "categories": [{"id": i} for i in ids],
                "annotations": [
                    {"id": i, "image_id": i, "category_id": c, "bbox": [10, 10, 50, 40]}
                    for i, c in enumerate(labels)
                ],
            }
        )
    )


@pytest.mark.parametrize(
    ("ids", "labels", "written", "reading"),
    [
        ([1, 2, 3], [1, 2, 3, 1], [0, 1, 2, 0], "from_0"),
        ([0, 1, 2], [0, 1, 2, 0], [1, 2, 3, 1], "from_1"),
        ([1, 2, 5, 9], [5, 9, 2, 1], [2, 3, 1, 0], "from_0"),
        ([1, 2, 5, 9], [5, 9, 2, 1], [4, 8, 1, 0], "plus_1"),
        ([1, 3, 5, 9], [5, 9, 3, 1], [6, 10, 4, 2], "minus_1"),
        ([7], [7, 7], [0, 0], "from_0"),
    ],
)
def test_differing_category_ids_are_refused_unless_an_option_explains_them(
    ids: list[int], labels: list[int], written: list[int], reading: Any, tmp_path: Path
) -> None:
    truth = objects(ids, labels)
    entries = [
        {**GOOD, "image_id": i, "category_id": c, "bbox": [11, 10, 50, 40]}
        for i, c in enumerate(written)
    ]
    path = write(tmp_path / "d.json", entries)
    with pytest.raises(DataError, match=f"0% have .* Give `category_ids {reading}`, or"):
        read_detections(path, truth)
    found, notices = read_detections(path, truth, category_ids=reading)
    assert truth.category_ids[found.category].tolist() == labels
    assert notices == []
    assert len(read_detections(path, truth, category_ids="as_is")[0]) <= len(labels)
    agnostic, _ = read_detections(path, truth, class_agnostic=True)
    assert agnostic.category.tolist() == [0] * len(labels)


@pytest.mark.parametrize(
    ("labels", "written"),
    [
        ([1, 2, 3, 1], [1, 2, 3, 2]),
        ([1, 1, 1, 1], [2, 2, 2, 2]),  # a model that has learned one class alone
        ([1, 2, 3, 3], [2, 1, 3, 1]),
    ],
)
def test_a_model_that_errs_is_no_reason_to_refuse(
    labels: list[int], written: list[int], tmp_path: Path
) -> None:
    entries = [{**GOOD, "image_id": i, "category_id": c} for i, c in enumerate(written)]
    truth = objects([1, 2, 3], labels)
    found, notices = read_detections(write(tmp_path / "d.json", entries), truth)
    assert truth.category_ids[found.category].tolist() == written
    assert notices == []


def test_areas_and_classes_can_be_changed(tmp_path: Path) -> None:
    found = [GOOD, {**GOOD, "image_id": 9, "bbox": [0, 0, 70, 50], "category_id": 7}]
    flags = ["--detections", str(write(tmp_path / "d.json", found))]
    flags += ["--val_annotations", str(annotations(tmp_path)), "--no_analysis"]

    def numbers(*more: str) -> dict[str, Any]:
        for evaluator in ("pycocotools", "fast"):
            assert main.main(["eval", *flags, *more, "--evaluator", evaluator]) == 0
            results = json.loads((tmp_path / "eval" / "results.json").read_text())
            written.append(results)
        assert written[-1] == written[-2]
        return dict(written[-1])

    written: list[dict[str, Any]] = []
    plain = numbers()
    assert "area_bounds" not in plain
    assert (plain["stats"]["AP"], plain["stats"]["AP_small"]) == (pytest.approx(0.5), None)
    ranged = numbers("--area_ranges", "2500", "4000")  # the boxes have 2000 and 3500
    assert ranged["area_bounds"] == [2500, 4000]
    areas = {name: ranged["stats"][f"AP_{name}"] for name in ("small", "medium", "large")}
    assert areas == {"small": pytest.approx(1), "medium": 0, "large": None}
    agnostic = numbers("--class_agnostic")
    assert agnostic["stats"]["AP"] == pytest.approx(1)
    assert [c["name"] for c in agnostic["per_class"]] == ["object"]


def test_whole_numbers_may_be_written_as_fractions(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [{**GOOD, "image_id": 4.0, "category_id": 7.0}])
    found, notices = read_detections(path, TRUTH)
    (row,) = found.to_coco(TRUTH)
    assert (row["image_id"], row["category_id"], notices) == (4, 7, [])


def test_corners_in_place_of_sizes_are_noticed(tmp_path: Path) -> None:
    boxes = [[0, 0, 20, 20], [40, 20, 40, 40], [20, 20, 40, 30], [0, 30, 70, 30]]
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    unknown_sizes = replace(TRUTH, sizes=np.zeros_like(TRUTH.sizes))
    for bbox, notice in ((boxes, 0), (corners, 1)):
        path = write(tmp_path / "d.json", [{**GOOD, "bbox": b} for b in bbox])
        found, notices = read_detections(path, TRUTH)
        assert len(notices) == notice
        assert not read_detections(path, unknown_sizes)[1], "no sizes are known"
    assert notices[0].startswith("3 of 4 boxes reach far beyond their images; they must be x, y")


def test_saved_detections_are_evaluated_and_stay_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "eval"
    folder.mkdir()
    detections = write(folder / "detections.json", [GOOD])
    before = detections.read_bytes()
    flags = ["--detections", str(detections), "--val_annotations", str(annotations(tmp_path))]
    numbers = []
    for evaluator in ("fast", "pycocotools"):
        assert main.main(["eval", *flags, "--evaluator", evaluator]) == 0
        numbers.append(json.loads((folder / "results.json").read_text()))
    assert numbers[0] == numbers[1]
    assert numbers[0]["stats"]["AP"] == pytest.approx(0.5)
    assert detections.read_bytes() == before
    analysis = json.loads((folder / "analysis.json").read_text())
    assert analysis["best_thresholds"] == {"dog": 0.5}
    assert analysis["worst"][0]["file_name"] == "9.png"
    rows = {r["image_id"]: r for r in json.loads((folder / "images.json").read_text())}
    assert rows[4] == {
        "image_id": 4, "file_name": "4.png", "lost": 0.5, "objects": 1, "found": 1, "missed": 0,
        "false_alarms": 0,
    }  # fmt: skip
    assert (rows[9]["found"], rows[9]["missed"]) == (0, 1)
    assert "<img" not in (folder / "report.html").read_text()
    assert "n/a: no small or large ground truth" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["results.json", "images.json", "report.html"])
def test_inputs_are_never_written_over(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "eval" / name
    file.parent.mkdir()
    write(file, [GOOD])
    (tmp_path / "link.json").symlink_to(file)
    truth = str(annotations(tmp_path))
    for given in (file, tmp_path / "link.json"):
        assert main.main(["eval", "--detections", str(given), "--val_annotations", truth]) == 2
        assert "would be overwritten" in capsys.readouterr().err
    assert json.loads(file.read_text()) == [GOOD]


def test_names_that_utf8_lacks_are_kept(tmp_path: Path) -> None:
    content = json.loads(annotations(tmp_path).read_text())
    content["categories"][0]["name"] = "cat\ud800"
    truth = write(tmp_path / "odd.json", content)
    detections = write(tmp_path / "found.json", [GOOD, {**GOOD, "image_id": 9, "category_id": 90}])
    flags = ["--detections", str(detections), "--val_annotations", str(truth)]
    assert main.main(["eval", *flags]) == 0
    for name in ("results.json", "analysis.json"):
        stored = json.loads((tmp_path / "eval" / name).read_text())
        rows = stored["per_class" if name == "results.json" else "classes"]
        assert [row["name"] for row in rows] == ["dog", "cat\ud800"]


def test_a_folder_in_place_of_a_file_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "eval" / "report.html").mkdir(parents=True)
    detections = write(tmp_path / "found.json", [GOOD])
    flags = ["--detections", str(detections), "--val_annotations", str(annotations(tmp_path))]
    assert main.main(["eval", *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "report.html" in message
    assert "Is a directory" in message


def test_available_images_are_shown(tmp_path: Path) -> None:
    for name in ("4", "9"):
        Image.new("RGB", (80, 60), "white").save(tmp_path / f"{name}.png")
    flags = ["--val_annotations", str(annotations(tmp_path)), "--val_images", str(tmp_path)]
    detections = write(tmp_path / "found.json", [])
    out = tmp_path / "out"
    assert (
        main.main(["eval", "--detections", str(detections), *flags, "--output_dir", str(out)]) == 0
    )
    page = (out / "eval" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2
    assert 'alt="9.png: 1 not found, 0 false alarms' in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--detections", "d.json"], "--coco_path"),
        (
            ["--detections", "d.json", "--checkpoint", "c.pth"],
            "--detections and --checkpoint are mutually exclusive",
        ),
        (["--detections", "d.json", "--evaluator", "slow"], "--evaluator"),
        (["--detections", "d.json", "--max_dets", "100"], "more than COCO's 100"),
        (["--detections", "d.json", "--area_ranges", "9", "3"], "--area_ranges: must be two areas"),
        (["--checkpoint", "c.pth", "--category_ids", "as_is"], "how to read --detections"),
        (["--detections", "none.json", "--val_annotations", "instances.json"], "none.json"),
        (["--detections", "d.json", "--val_annotations", "none.json"], "none.json"),
    ],
)
def test_wrong_detections_and_options_are_one_line_errors(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    annotations(tmp_path)
    write(tmp_path / "d.json", [GOOD])
    assert main.main(["eval", *flags]) == 2
    errors = capsys.readouterr().err.strip()
    assert message in errors
    assert "\n" not in errors
