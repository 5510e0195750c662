"""Saved detections: read, refused in one line, and evaluated without a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import main
from engine.evaluation.detections import read_detections
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
        ([GOOD, {"image_id": 4}], "entry 1: not an object with image_id, category_id"),
        ([{**GOOD, "image_id": "4"}], "entry 0: image_id is not a whole number"),
        ([{**GOOD, "category_id": True}], "category_id is not a whole number"),
        ([{**GOOD, "bbox": [1, 2, 3]}], "bbox is not four finite numbers"),
        (
            [{**GOOD, "bbox": [60, 50, -10, 5]}],
            r"negative .* be \[x, y, width, height\]",
        ),
        ([{**GOOD, "score": float("nan")}], "score is not a finite number"),
        ([{**GOOD, "image_id": 5}, GOOD], "1 image ids are not in the data, such as 5"),
        ([{**GOOD, "image_id": 4.5}], "image_id is not a whole number"),
        ([{**GOOD, "bbox": [0, 0, 1e200, 1e200]}], "bbox is not four finite numbers"),
        ([{**GOOD, "bbox": [0.1, 0.1, 0.5, 1]}], "between 0 and 1, .* must be in pixels"),
        (["two\nlines"], "entry 0: not an object"),
    ],
)
def test_what_is_no_detection_is_refused_in_one_line(
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
    assert "<img" not in (folder / "report.html").read_text()
    assert "n/a: no small or large ground truth" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["results.json", "analysis.json", "report.html"])
def test_what_was_read_is_never_written_over(
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


def test_a_folder_in_the_way_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "eval" / "report.html").mkdir(parents=True)
    detections = write(tmp_path / "found.json", [GOOD])
    flags = ["--detections", str(detections), "--val_annotations", str(annotations(tmp_path))]
    assert main.main(["eval", *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "report.html" in message
    assert "Is a directory" in message


def test_images_at_hand_are_shown(tmp_path: Path) -> None:
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
    assert 'alt="9.png: 1 missed, 0 false alarms' in page


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
        (["--detections", "none.json", "--val_annotations", "instances.json"], "none.json"),
        (["--detections", "d.json", "--val_annotations", "none.json"], "none.json"),
    ],
)
def test_mistakes_are_one_line(
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
