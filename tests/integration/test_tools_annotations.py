"""Annotations as other tools write them: `check`, `train`, `eval` and `convert` read the same.

Each image of 100 x 80 pixels has a kettle at [10, 20, 30, 40] and a mug at [60, 10, 20, 30].
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from main import main
from tests.integration.conftest import TINY, Cli, read_log

Content = dict[str, Any]
Change = Callable[[Content], object]
NUM_IMAGES = 6
KETTLE, MUG = [10, 20, 30, 40], [60, 10, 20, 30]
SMALL = ("--train_scales", "32", "--eval_scale", "32", "--max_size", "48", "--num_workers", "0")


def write(folder: Path, change: Change = lambda content: None) -> tuple[Path, Path]:
    """Write a set that a change was made to; return its JSON file and image folder."""
    images = folder / "images"
    images.mkdir(parents=True)
    content: Content = {
        "images": [], "annotations": [],
        "categories": [{"id": 1, "name": "kettle"}, {"id": 2, "name": "mug"}],
    }  # fmt: skip
    for k in range(1, NUM_IMAGES + 1):
        Image.new("RGB", (100, 80), (40 * k, 90, 90)).save(images / f"shot_{k}.png")
        content["images"].append(
            {"id": k, "file_name": f"shot_{k}.png", "width": 100, "height": 80}
        )
        for category, (x, y, w, h) in enumerate((KETTLE, MUG), 1):
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            content["annotations"].append(
                {"id": 2 * k + category, "image_id": k, "category_id": category,
                 "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [outline]}
            )  # fmt: skip
    change(content)
    (folder / "ann.json").write_text(json.dumps(content))
    return folder / "ann.json", images


def to_all(section: str, **values: Callable[[Content], object]) -> Change:
    """Return a change that sets values, each made of the entry."""

    def change(content: Content) -> None:
        for entry in content[section]:
            entry.update({key: value(entry) for key, value in values.items()})

    return change


def both(*changes: Change) -> Change:
    return lambda content: [change(content) for change in changes]


def drop(key: str) -> Change:
    return lambda content: [entry.pop(key) for entry in content["annotations"]]


def runs(entry: Content) -> Content:
    x, y, w, h = entry["bbox"]
    counts = [x * 80 + y, *([h, 80 - h] * (w - 1)), h]
    return {"size": [80, 100], "counts": [*counts, 8000 - sum(counts)]}


CASES: dict[str, tuple[Change, dict[str, int]]] = {
    "sound": (lambda content: None, {}),
    "categories as text": (
        to_all("annotations", category_id=lambda a: str(a["category_id"])), {"text_number": 12},
    ),
    "boxes as text": (
        to_all("annotations", bbox=lambda a: [f"{v:.1f}" for v in a["bbox"]],
               area=lambda a: str(a["area"])), {"text_number": 12},
    ),
    "boxes in one text": (
        to_all("annotations", bbox=lambda a: str(a["bbox"])), {"text_number": 12},
    ),
    "sizes as text": (to_all("images", width=lambda i: "100"), {"text_number": 6}),
    "images by text": (
        both(to_all("images", id=lambda i: f"shot {i['id']}"),
             to_all("annotations", image_id=lambda a: f"shot {a['image_id']}")), {"text_id": 18},
    ),
    "images by padded numbers": (
        both(to_all("images", id=lambda i: f"{i['id']:04d}"),
             to_all("annotations", image_id=lambda a: f"{a['image_id']:04d}")), {"text_id": 18},
    ),
    "images by file name": (
        to_all("annotations", image_id=lambda a: f"shot_{a['image_id']}"), {"text_id": 12},
    ),
    "categories by name": (
        both(to_all("annotations", category_id=lambda a: ["kettle", "mug"][a["category_id"] - 1]),
             to_all("categories", id=lambda c: c["name"])), {"text_id": 14},
    ),
    "no boxes, polygons": (drop("bbox"), {"computed_bbox": 12}),
    "empty boxes, polygons": (to_all("annotations", bbox=lambda a: []), {"computed_bbox": 12}),
    "zeros, runs": (
        to_all("annotations", segmentation=runs, bbox=lambda a: [0, 0, 0, 0]),
        {"computed_bbox": 12},
    ),
    "crowds as text": (to_all("annotations", iscrowd=lambda a: "false"), {"text_number": 12}),
    "turned": (
        to_all("annotations", attributes=lambda a: {"rotation": 45.0}, segmentation=lambda a: []),
        {"rotated_bbox": 12},
    ),
    "slashes": (
        to_all("images", file_name=lambda i: "images\\" + i["file_name"]), {"matched_name": 6},
    ),
    "folder twice": (
        to_all("images", file_name=lambda i: "images/" + i["file_name"]), {"matched_name": 6},
    ),
    "no suffix": (to_all("images", file_name=lambda i: i["file_name"][:-4]), {"matched_name": 6}),
}  # fmt: skip


def findings(file: Path) -> dict[str, int]:
    return {f["kind"]: f["count"] for f in json.loads(file.read_text())["findings"]}


@pytest.mark.parametrize("case", CASES)
def test_every_command_reads_the_truth_and_reports_how(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, kinds = CASES[case]
    file, images = write(tmp_path / "set", change)
    place = ["--train_images", str(images), "--train_annotations", str(file)]
    out = tmp_path / "out"
    fixed = tmp_path / "fixed.json"
    assert main(["check", *place, *SMALL, "--output_dir", str(out), "--fix", str(fixed)]) == 0
    assert findings(out / "check.json") == kinds
    assert "(12 usable boxes)" in capsys.readouterr().out

    for source in (file, fixed):
        target = tmp_path / f"converted_{source.stem}"
        assert main(["convert", "--data_path", str(source), "--images", str(images), "--splits",
                     "train", "--output_dir", str(target)]) == 0  # fmt: skip
        written = json.loads((target / "annotations" / "instances_train2017.json").read_text())
        name = {i["id"]: i["file_name"] for i in written["images"]}
        label = {c["id"]: c["name"] for c in written["categories"]}
        boxes = [(name[a["image_id"]], label[a["category_id"]], a["bbox"])
                 for a in written["annotations"]]  # fmt: skip
        assert boxes == [
            (f"shot_{k}.png", *box) for k in range(1, NUM_IMAGES + 1)
            for box in (("kettle", KETTLE), ("mug", MUG))
        ]  # fmt: skip
    again = tmp_path / "again"
    place = ["--train_images", str(images), "--train_annotations", str(fixed)]
    assert main(["check", *place, *SMALL, "--output_dir", str(again)]) == 0
    left = {"rotated_bbox"}  # what a corrected copy cannot fix
    assert findings(again / "check.json").keys() == kinds.keys() & left


def located(file: Path, images: Path, *splits: str) -> list[str]:
    return [word for split in splits for word in (
        f"--{split}_images", str(images), f"--{split}_annotations", str(file))]  # fmt: skip


def test_text_ids_come_back_in_every_result_file(cli: Cli, tmp_path: Path) -> None:
    change = both(CASES["images by text"][0], CASES["categories by name"][0])
    file, images = write(tmp_path / "set", change)
    run = tmp_path / "run"
    done = cli("train", "--config", TINY, *located(file, images, "train", "val"), *SMALL,
               "--epochs", "1", "--output_dir", run, "--no_probe", "--no_tensorboard")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert findings_of(run, "train") == findings_of(run, "val") == {"text_id": 6 + 12 + 2}
    done = cli("eval", "--checkpoint", run / "last.pth", "--evaluator", "pycocotools")
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "eval" / "detections.json").read_text())
    assert {d["image_id"] for d in found} == {f"shot {k}" for k in range(1, NUM_IMAGES + 1)}
    assert {d["category_id"] for d in found} <= {"kettle", "mug"}
    results = json.loads((run / "eval" / "results.json").read_text())
    assert [row["category_id"] for row in results["per_class"]] == ["kettle", "mug"]
    analysis = json.loads((run / "eval" / "analysis.json").read_text())
    assert all(image["image_id"].startswith("shot ") for image in analysis["worst"])
    done = cli("predict", "--checkpoint", run / "last.pth", "--input", images, "--output_dir",
               tmp_path / "seen")  # fmt: skip
    assert done.returncode == 0, done.stderr
    predicted = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert {p["category_id"] for p in predicted} <= {"kettle", "mug"}


def findings_of(run: Path, split: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for finding in json.loads((run / "data_report.json").read_text())[split]["findings"]:
        found[finding["kind"]] = found.get(finding["kind"], 0) + finding["count"]
    return found


def test_a_set_of_crowds_is_wrong_refused_and_can_be_read_as_objects(
    cli: Cli, tmp_path: Path
) -> None:
    file, images = write(tmp_path / "set", to_all("annotations", iscrowd=lambda a: 1))
    place = located(file, images, "train")
    done = cli("check", *place, *SMALL)
    assert done.returncode == 1
    assert "12  crowds instead of objects (mostly_crowd)" in done.stdout
    assert "(0 usable boxes)" in done.stdout
    assert "no_usable_box" in done.stdout
    assert "no_boxes" not in done.stdout
    train = ("train", "--config", TINY, *SMALL, "--max_steps", "1", "--no_probe",
             "--no_tensorboard", "--output_dir")  # fmt: skip
    both_places = located(file, images, "train", "val")
    done = cli(*train, tmp_path / "refused", *both_places)
    assert done.returncode == 2
    assert "crowds instead of objects: 12" in done.stderr
    assert "--crowd" in done.stderr
    done = cli("check", *place, *SMALL, "--crowd", "as_objects")
    assert done.returncode == 0
    assert "12 annotations (12 usable boxes)" in done.stdout
    done = cli(*train, tmp_path / "run", *both_places, "--crowd", "as_objects")
    assert done.returncode == 0, done.stderr
    assert findings_of(tmp_path / "run", "train") == {"crowd_as_object": 12}


def test_validation_without_usable_boxes_is_not_available(cli: Cli, tmp_path: Path) -> None:
    sound = write(tmp_path / "set")
    crowds = write(tmp_path / "crowds", to_all("annotations", iscrowd=lambda a: 1))
    run = tmp_path / "run"
    done = cli("train", "--config", TINY, *located(*sound, "train"), *located(*crowds, "val"),
               *SMALL, "--epochs", "1", "--output_dir", run, "--no_probe",
               "--no_tensorboard")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "AP n/a" in done.stdout + done.stderr
    assert read_log(run)
    done = cli("eval", "--checkpoint", run / "best.pth")
    assert done.returncode == 0, done.stderr
    assert "n/a: no ground truth" in done.stdout


@pytest.mark.parametrize(
    ("meaning", "kind", "boxes", "annotations"),
    [
        (None, "ignored_as_crowd", 6, 12),
        ("drop", "ignored_dropped", 6, 6),
        ("keep", "ignored_kept", 12, 12),
    ],
)
def test_ignored_annotations_follow_the_option(
    cli: Cli, tmp_path: Path, meaning: str | None, kind: str, boxes: int, annotations: int
) -> None:
    change = to_all("annotations", ignore=lambda a: int(a["category_id"] == 2))
    file, images = write(tmp_path / "set", change)
    option = ["--ignore_key", meaning] if meaning else []
    fixed = tmp_path / "fixed.json"
    done = cli("check", *located(file, images, "train"), *SMALL, *option, "--fix", fixed)
    assert done.returncode == 0, done.stderr
    assert f"({boxes} usable boxes)" in done.stdout
    assert f"(note, {kind})" in done.stdout
    written = json.loads(fixed.read_text())["annotations"]
    assert len(written) == annotations
    assert sum(a["iscrowd"] for a in written) == (0 if meaning else 6)
    done = cli("convert", "--data_path", file, "--images", images, "--splits", "train", *option,
               "--output_dir", tmp_path / "out")  # fmt: skip
    assert f"train: {NUM_IMAGES} images, {annotations} boxes" in done.stdout


def test_names_of_thousands_of_letters_are_cut_where_they_are_printed(
    cli: Cli, tmp_path: Path
) -> None:
    names = to_all("categories", name=lambda c: f"{c['id']}\x1b" + "x" * 3000)
    file, images = write(tmp_path / "set", names)
    done = cli("check", *located(file, images, "train"), *SMALL)
    assert done.returncode == 0
    assert "x" * 100 in done.stdout
    assert "x" * 200 not in done.stdout
    assert "\x1b" not in done.stdout
    run = tmp_path / "run"
    commands = (
        ("train", "--config", TINY, *located(file, images, "train", "val"), *SMALL, "--epochs",
         "1", "--output_dir", run, "--no_probe", "--no_tensorboard"),
        ("eval", "--checkpoint", run / "last.pth"),
        ("predict", "--checkpoint", run / "last.pth", "--input", images, "--output_dir",
         tmp_path / "seen"),
        ("explain", "--checkpoint", run / "last.pth", "--input", images / "shot_1.png",
         "--output_dir", tmp_path / "why", "--score_threshold", "0", "--count", "1"),
        ("train", "--config", TINY, *located(file, images, "train", "val"), *SMALL, "--max_steps",
         "1", "--finetune", run / "last.pth", "--output_dir", tmp_path / "on", "--no_probe",
         "--no_tensorboard"),
    )  # fmt: skip
    for command in commands:
        done = cli(*command)
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        assert "x" * 200 not in said, command[0]
        assert "\x1b" not in said, command[0]
    unnamed = write(tmp_path / "unnamed", lambda c: [e.pop("name") for e in c["categories"]])
    done = cli("check", *located(*unnamed, "train"), *SMALL)
    assert done.returncode == 0
    assert "2  categories without a name (note, no_name)" in done.stdout


def test_first_lines_report_and_check_count_the_same_boxes(cli: Cli, tmp_path: Path) -> None:
    """Of images that are not there; and boxes that a corrected copy would leave out."""
    file, images = write(
        tmp_path / "set", lambda c: c["annotations"].append({**c["annotations"][0], "id": 99})
    )
    (images / "shot_3.png").unlink()
    run = tmp_path / "run"
    done = cli("check", *located(file, images, "train"), *SMALL)
    assert "6 images, 13 annotations (11 usable boxes), 2 classes: kettle 6, mug 5" in done.stdout
    done = cli("train", "--config", TINY, *located(file, images, "train", "val"), *SMALL,
               "--max_steps", "1", "--no_probe", "--no_tensorboard",
               "--output_dir", run)  # fmt: skip
    assert "6 images, 11 boxes" in done.stdout + done.stderr
    assert json.loads((run / "data_report.json").read_text())["train"]["boxes"] == 11
