"""Exports of tools through the command line: `check`, `train`, `eval` and `convert` agree."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import TINY, Cli
from tests.unit.datasets.formats import test_layouts as layouts
from tests.unit.datasets.formats.exports import KETTLE, MUG, save_images, write_yaml, write_yolo
from tests.unit.datasets.formats.test_layouts import boxes, load

TRAIN = ("--config", TINY, "--max_steps", "1", "--no_probe", "--no_tensorboard")
CHECK = ("--train_scales", "64", "--max_size", "96", "--num_workers", "0")


def test_an_export_trains_and_is_evaluated_from_its_folder_alone(cli: Cli, tmp_path: Path) -> None:
    layouts.roboflow_coco(tmp_path / "set")
    done = cli("train", *TRAIN, "--data_path", tmp_path / "set", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "'set' coco, by train/_annotations.coco.json; images of train in train" in done.stdout
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert [report[split]["boxes"] for split in ("train", "val")] == [6, 6]
    done = cli("eval", "--checkpoint", tmp_path / "run" / "last.pth", "--no_analysis")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("write", [layouts.voc_beside, layouts.yolo_valid, layouts.labelme])
def test_check_and_convert_read_what_training_reads(
    cli: Cli, write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / "set")
    place = ("--data_path", tmp_path / "set", "--voc_corners", "edges")
    done = cli("check", *CHECK, *place, "--output_dir", tmp_path / "look")
    found = json.loads((tmp_path / "look" / "check.json").read_text())
    assert {split["usable_boxes"] for split in found["splits"].values()} == {6}
    kinds = {finding["kind"] for finding in found["findings"] if not finding["note"]}
    assert kinds <= {"duplicate_image", "leak"}  # the splits have the same images
    assert "format of the data" in done.stdout
    done = cli("convert", *place, "--to", "coco", "--output_dir", tmp_path / "coco")
    assert done.returncode == 0, done.stderr
    assert "format of the data" in done.stdout
    for split in ("train", "val"):
        assert boxes(load(tmp_path / "coco", split)) == boxes(load(tmp_path / "set", split))


def test_pixels_are_listed_by_check_and_refused_by_all_others(cli: Cli, tmp_path: Path) -> None:
    write_yolo(tmp_path / "images", tmp_path / "labels", lines="0 25 40 30 40\n1 70 25 20 30\n")
    write_yaml(tmp_path, train="images", val="images")
    place = ("--data_path", tmp_path)
    done = cli("check", *CHECK, *place, "--splits", "train")
    assert done.returncode == 1
    assert "YOLO values above 1: pixels?" in done.stdout
    for command in (
        ("train", *TRAIN, *place, "--output_dir", tmp_path / "run"),
        ("eval", "--detections", tmp_path / "none.json", *place),
        ("convert", *place, "--to", "coco", "--output_dir", tmp_path / "out"),
    ):
        done = cli(*command)
        assert done.returncode == 2
        assert "Are they pixels?" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_convert_that_reads_nothing_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    write_yolo(tmp_path / "images", tmp_path / "labels", lines="0 0.5 0.5\n")
    write_yaml(tmp_path, train="images", val="images")
    done = cli("convert", "--data_path", tmp_path, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert "nothing to write of the split 'train'" in done.stderr
    assert "annotation files or lines that cannot be read: 3" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_convert_writes_a_set_of_background_alone(cli: Cli, tmp_path: Path) -> None:
    write_yolo(tmp_path / "images", tmp_path / "labels", lines="")
    write_yaml(tmp_path, train="images", val="images")
    done = cli("convert", "--data_path", tmp_path, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "train: 3 images, 0 boxes" in done.stdout


def test_check_looks_for_unused_images_only_where_images_are(cli: Cli, tmp_path: Path) -> None:
    """Not in all that lies below the folder that two lists' folders have in common."""
    for k, name in enumerate(("here", "there")):
        write_yolo(tmp_path / name, tmp_path / name, first=3 * k)
    save_images(tmp_path / "far" / "away", 1, first=90)
    save_images(tmp_path / "here" / "below", 1, first=91)
    save_images(tmp_path / "here", 1, first=92)
    names = [f"{tmp_path}/{name}/shot_{k}.png\n" for name, k in (("here", 0), ("there", 3))]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").write_text("".join(names))
    write_yaml(tmp_path / "set", train="train.txt")
    out = tmp_path / "look"
    cli("check", *CHECK, "--data_path", tmp_path / "set", "--splits", "train", "--output_dir", out)
    found = json.loads((out / "check.json").read_text())["findings"]
    unused = next(finding for finding in found if finding["kind"] == "unused_file")
    places = {offender["place"] for offender in unused["offenders"]}
    assert places == {"here/shot_1.png", "here/shot_2.png", "here/shot_92.png",
                      "there/shot_4.png", "there/shot_5.png"}  # fmt: skip


def test_labelme_is_read_and_not_written(cli: Cli, tmp_path: Path) -> None:
    layouts.labelme(tmp_path / "set")
    content = json.loads((tmp_path / "set" / "train" / "shot_1.json").read_text())
    x, y, _, h = MUG
    content["shapes"] = [
        {"label": "mug", "points": [[x, y], [x + 3, y + 4]], "shape_type": "circle"},
        {"label": "kettle", "points": [[KETTLE[0], h]], "shape_type": "point"},
        {"label": "kettle", "points": [[1, 2], [30, 40]], "shape_type": "line"},
        {"label": "kettle", "points": [[1, 2], [30, 40], [9, 50]], "shape_type": "linestrip"},
    ]
    (tmp_path / "set" / "train" / "shot_1.json").write_text(json.dumps(content))
    done = cli("convert", "--data_path", tmp_path / "set", "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for kind in ("point", "line", "linestrip"):  # which enclose nothing
        assert f"'shot_1.json' '{kind}' has no box" in done.stdout
    written = json.loads((tmp_path / "out/annotations/instances_train2017.json").read_text())
    first = [a["bbox"] for a in written["annotations"] if a["image_id"] == 1]
    assert first == [[x - 5, y - 5, 10, 10]]
    done = cli("convert", "--data_path", tmp_path / "set", "--to", "labelme", "--output_dir",
               tmp_path / "more")  # fmt: skip
    assert done.returncode == 2
    assert "it is read, not written. Choose coco, voc or yolo." in done.stderr
    assert not (tmp_path / "more").exists()
