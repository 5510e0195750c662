"""Predictions on images: what is written, where, and that no image is ever overwritten."""

import copy
import csv
import json
import os
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps
from torch import nn

from configs.schema import DataConfig
from engine.commands.predict import (
    chosen_classes,
    read_thresholds,
    report_thresholds,
    write_predictions,
)
from engine.detector import Detector
from engine.predictions import crop_folders, drawn_names, relative_names
from models.deformable_detr import DeformableDETR
from models.queries import DetectorOutput
from util.batch import PaddedBatch
from util.classes import Classes
from util.console import log
from util.errors import ConfigError, DataError
from util.files import refuse_overwriting

CLASSES = Classes((0, 3, 7), ("", "cat", "dög"))  # label 0 is an unused id
ORIENTATION = 0x0112


class RedFinder(nn.Module):
    """Finds the smallest box around red pixels: a detector whose answers a test knows."""

    def forward(self, batch: PaddedBatch) -> DetectorOutput:
        """Give each box three times: sure, hidden behind an unused label, and doubtful."""
        assert not torch.is_grad_enabled()
        assert not self.training
        boxes = []
        for image, (height, width) in zip(batch.images, batch.sizes, strict=True):
            ys, xs = torch.nonzero(image[0, :height, :width] > 0.5, as_tuple=True)
            left, top = xs.min() / width, ys.min() / height
            right, bottom = (xs.max() + 1) / width, (ys.max() + 1) / height
            centre = [(left + right) / 2, (top + bottom) / 2]
            boxes.append(torch.stack([*centre, right - left, bottom - top]))
        logits = torch.tensor([0.8, 0.9, 0.2]).logit().expand(len(boxes), 1, 3)
        return {"pred_logits": logits, "pred_boxes": torch.stack(boxes)[:, None]}


RED_FINDER = Detector(
    cast(DeformableDETR, RedFinder()),
    CLASSES,
    data=DataConfig(eval_scale=60),  # half the size of the images here
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    device=torch.device("cpu"),
)


def read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        upright: Image.Image = ImageOps.exif_transpose(image)
        return upright.convert("RGB")


def save_image(
    path: Path, *, orientation: int = 1, red: tuple[int, ...] = (20, 10, 60, 50)
) -> None:
    """Write a black image of 160 x 120 with a red rectangle (x0, y0, x1, y1)."""
    image = Image.new("RGB", (160, 120))
    image.paste((255, 0, 0), (red[0], red[1], red[2], red[3]))
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)


def run(paths: list[Path], output_dir: Path, *, threshold: float = 0.5) -> list[dict[str, Any]]:
    """Predict, two images a batch, and return what `predictions.json` holds."""
    write_predictions(
        RED_FINDER, paths, output_dir, thresholds={"cat": threshold, "dög": threshold}, batch_size=2
    )
    text = (output_dir / "predictions.json").read_text("ascii")
    predictions: list[dict[str, Any]] = json.loads(text)
    assert text == json.dumps(predictions, indent=1) + "\n"  # as if written at once
    return predictions


def changes(path: Path, drawn: Path) -> tuple[int, int, int, int] | None:
    difference = ImageChops.difference(read(path), read(drawn)).convert("L")
    return difference.point(lambda v: 255 * (v > 60)).getbbox()  # JPEG changes all a little


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with images of three formats in two places, one of them turned."""
    save_image(tmp_path / "in" / "a" / "one.png")
    save_image(tmp_path / "in" / "b" / "one.png", red=(100, 80, 150, 110))
    save_image(tmp_path / "in" / "b" / "turned.JPG", orientation=6)
    save_image(tmp_path / "in" / "b" / "one.bmp")
    return tmp_path / "in"


def files(folder: Path) -> Mapping[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_writes_each_image_and_one_json(folder: Path, tmp_path: Path) -> None:
    before, paths = files(folder), sorted(folder.rglob("*.*"))
    predictions = run(paths, tmp_path / "out")
    assert files(folder) == before
    names = [p.relative_to(folder).as_posix() for p in paths]
    assert names == ["a/one.png", "b/one.bmp", "b/one.png", "b/turned.JPG"]
    written = {"a/one.png", "b/one.png", "b/one_2.png", "b/turned.JPG"}
    assert set(files(tmp_path / "out")) == written | {"predictions.json", "predictions.jsonl"}
    assert [(p["image_id"], p["file_name"]) for p in predictions[::2]] == list(enumerate(names))
    first, second = predictions[:2]
    assert first == {
        "image_id": 0, "file_name": "a/one.png", "category_id": 3, "category_name": "cat",
        "bbox": pytest.approx([20.0, 10.0, 40.0, 40.0]), "score": pytest.approx(0.9),
    }  # fmt: skip
    assert (second["category_id"], second["category_name"]) == (7, "dög")
    assert predictions[4]["bbox"] == pytest.approx([100.0, 80.0, 50.0, 30.0])


def test_rotated_image_is_drawn_upright(folder: Path, tmp_path: Path) -> None:
    predictions = run([folder / "b" / "turned.JPG"], tmp_path / "out")
    drawn = read(tmp_path / "out" / "turned.JPG")
    assert drawn.size == (120, 160)
    assert predictions[0]["bbox"] == pytest.approx([70, 20, 40, 40], abs=2)
    with Image.open(tmp_path / "out" / "turned.JPG") as stored:
        assert stored.format == "JPEG"
        assert stored.getexif().get(ORIENTATION, 1) == 1, "a viewer would turn it again"


@pytest.mark.parametrize(("threshold", "drawn"), [(0.95, 0), (0.5, 1), (0.1, 2)])
def test_threshold_decides_what_is_drawn_not_what_is_stored(
    folder: Path, tmp_path: Path, threshold: float, drawn: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "a" / "one.png"
    assert len(run([path], tmp_path / "out", threshold=threshold)) == 2
    said = "1 image with 1 box at" if drawn == 1 else f"1 image with {drawn} boxes at"
    assert said in capsys.readouterr().out
    changed = changes(path, tmp_path / "out" / "one.png")
    assert (changed is None) == (drawn == 0)
    if changed is not None:
        assert changed[0] <= 20
        assert changed[2] >= 60


def test_unreadable_image_is_named_and_the_rest_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "a" / "broken.png"
    broken.write_bytes((folder / "a" / "one.png").read_bytes()[:60])
    paths = [broken, folder / "a" / "one.png", broken]
    predictions = run(paths, tmp_path / "out")
    assert {p["image_id"] for p in predictions} == {1}
    output = capsys.readouterr().out
    assert "broken.png" in output
    assert "2 of 3 images could not be read" in output
    with pytest.raises(DataError, match="`input`: none of the 1 images can be read"):
        run([broken], tmp_path / "nothing")


def test_inputs_are_never_overwritten(folder: Path, tmp_path: Path) -> None:
    before, paths = files(folder), sorted(folder.rglob("*.*"))
    with pytest.raises(ConfigError, match="output_dir: .* is one of the inputs"):
        run(paths, folder)
    os.symlink(folder, tmp_path / "link")
    with pytest.raises(ConfigError, match="Choose another folder"):
        run(paths, tmp_path / "link")
    assert files(folder) == before


def test_file_in_place_of_the_folder_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="output_dir .*out: the folder cannot be made"):
        run([folder / "a" / "one.png"], tmp_path / "out")


def test_second_run_replaces_the_first(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run([folder / "a" / "one.png"], tmp_path / "out")
    assert set(files(tmp_path / "out")) == {
        "one.png", "predictions.json", "predictions.jsonl"
    }  # fmt: skip


def test_images_without_a_box_leave_an_empty_list(folder: Path, tmp_path: Path) -> None:
    nameless = copy.copy(RED_FINDER)
    nameless.classes = Classes((0, 1, 2), ("", "", "dög"))  # two labels stand for no class
    one = folder / "a" / "one.png"
    write_predictions(nameless, [one], tmp_path / "some", thresholds={"dög": 0.5})
    assert len(json.loads((tmp_path / "some" / "predictions.json").read_text())) == 1
    nameless.classes = Classes((0, 1, 2, 3), ("", "", "", "dög"))
    write_predictions(nameless, [one], tmp_path / "none", thresholds={"dög": 0.5})
    assert (tmp_path / "none" / "predictions.json").read_text() == "[]\n"


NAMES = st.sampled_from(["a.png", "A.PNG", "a.bmp", "a.jpg", "a_2.png", "a", "a.b.tif", "a_2.bmp"])
FOLDERS = st.sampled_from(["", "x", "x/y", "z/../x", "../up"])


@given(st.lists(st.tuples(FOLDERS, NAMES), min_size=1, max_size=12))
def test_no_two_outputs_are_one_file(parts: list[tuple[str, str]]) -> None:
    names = relative_names([Path(folder, name) for folder, name in parts])
    outputs = drawn_names(names)
    assert len({name.casefold() for name in outputs}) == len(parts)
    for name, output in zip(map(Path, names), map(Path, outputs), strict=True):
        assert ".." not in output.parts
        assert not output.is_absolute()
        assert output.parts[:-1] == name.parts[:-1]
        kept = name.suffix.lower() in (".png", ".jpg")
        assert output.suffix == (name.suffix if kept else ".png")


def test_missing_files_do_not_disturb_the_check(tmp_path: Path) -> None:
    refuse_overwriting([tmp_path / "gone.png"], [tmp_path / "gone.png"])


def test_thresholds_of_names_that_utf8_lacks_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "disabled", True)  # no test report could hold the name
    report_thresholds(tmp_path, {"cat\ud800": 0.25}, {"cat\ud800": 0.25})
    stored = json.loads((tmp_path / "score_thresholds.json").read_text())
    assert stored == {"cat\ud800": 0.25}


def test_long_names_are_cut_where_thresholds_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "x" * 3000
    report_thresholds(tmp_path, {name: 0.25}, {name})
    printed = capsys.readouterr().out
    assert "x" * 100 in printed
    assert "x" * 200 not in printed
    assert name in (tmp_path / "score_thresholds.json").read_text()


def test_lines_are_written_as_the_images_come(folder: Path, tmp_path: Path) -> None:
    paths = sorted(folder.rglob("*.*"))
    out = tmp_path / "out"
    seen = []

    class Watching(RedFinder):
        def forward(self, batch: PaddedBatch) -> DetectorOutput:
            path = out / "predictions.jsonl"
            seen.append(len(path.read_text().splitlines()))
            return super().forward(batch)

    detector = copy.copy(RED_FINDER)
    detector.network = cast(DeformableDETR, Watching().eval())
    write_predictions(detector, paths, out, thresholds={"cat": 0.5, "dög": 0.5})
    assert seen == [0, 1, 2, 3]
    images = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert sorted(image["image_id"] for image in images) == [0, 1, 2, 3]
    flat = [
        {"image_id": image["image_id"], "file_name": image["file_name"], **box}
        for image in sorted(images, key=lambda image: int(image["image_id"]))
        for box in image["boxes"]
    ]
    assert flat == json.loads((out / "predictions.json").read_text())


def test_a_table_and_crops_hold_what_is_drawn(folder: Path, tmp_path: Path) -> None:
    paths, out = sorted(folder.rglob("*.*")), tmp_path / "out"
    write_predictions(
        RED_FINDER, paths, out, thresholds={"cat": 0.5, "dög": 0.5}, draw=False, table=True,
        crops=True,
    )  # fmt: skip
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["file_name"]: row for row in csv.DictReader(file)}
    assert len(rows) == 4
    row = rows["b/one.png"]
    assert (row["category_id"], row["category_name"]) == ("3", "cat")
    corners = [float(row[key]) for key in ("x0", "y0", "x1", "y1")]
    assert corners == pytest.approx([100.0, 80.0, 150.0, 110.0])
    written = set(files(out)) - {"predictions.json", "predictions.jsonl", "predictions.csv"}
    assert written == {
        f"crops/cat/{stem}_0.png" for stem in ("one_0", "one_1", "one_2", "turned_3")
    }
    crop = read(out / "crops" / "cat" / "one_2_0.png")
    assert crop.size[0] in (50, 51)  # a rounding may add a row of the black around it
    assert crop.getpixel((25, 15)) == (255, 0, 0)
    turned = read(out / "crops" / "cat" / "turned_3_0.png")
    assert turned.getpixel((turned.width // 2, turned.height // 2)) == pytest.approx(
        (255, 0, 0), abs=8
    )


def test_classes_that_are_not_chosen_are_left_out(folder: Path, tmp_path: Path) -> None:
    one = folder / "a" / "one.png"
    write_predictions(RED_FINDER, [one], tmp_path / "out", thresholds={"dög": 0.1}, draw=False)
    (found,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert found["category_name"] == "dög"
    assert chosen_classes(["7", "cat"], RED_FINDER) == {"dög", "cat"}
    assert chosen_classes([], RED_FINDER) == {"cat", "dög"}
    with pytest.raises(ConfigError, match="classes: the model has no class 'cst'. Known: cat, dög"):
        chosen_classes(["cst"], RED_FINDER)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"cat": 0.5, "fox": 0.1}', "the model has no class 'fox'"),
        ('{"cat": 1.5}', r"the score of 'cat' must be in 0..1, not 1.5"),
        ('{"cat": true}', r"the score of 'cat' must be in 0..1, not True"),
        ('{"cat": NaN}', r"the score of 'cat' must be in 0..1, not nan"),
        ("[0.5]", "must be one object of minimum scores"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_of_thresholds_is_checked(tmp_path: Path, content: str, error: str) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(content)
    with pytest.raises(DataError, match=error):
        read_thresholds(str(path), ("cat", "dög"))
    path.write_text('{"cat": 0.25}')
    assert read_thresholds(str(path), ("cat", "dög")) == {"cat": 0.25}
    with pytest.raises(DataError, match="gone.json: cannot be read"):
        read_thresholds(str(tmp_path / "gone.json"), ("cat",))


@given(st.lists(st.text(max_size=90), unique=True, max_size=8))
def test_folders_of_classes_are_safe_and_differ(names: list[str]) -> None:
    folders = crop_folders(names)
    assert list(folders) == names
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    for folder in folders.values():
        assert folder.strip()
        assert not set(folder) & set("./\\:\0\n")
        assert len(folder.encode()) < 256


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    class Crowded(RedFinder):
        def forward(self, batch: PaddedBatch) -> DetectorOutput:
            found = super().forward(batch)
            logits, boxes = found["pred_logits"], found["pred_boxes"]
            return {
                "pred_logits": logits.expand(-1, 100, 3), "pred_boxes": boxes.expand(-1, 100, 4)
            }  # fmt: skip

    detector = copy.copy(RED_FINDER)
    detector.network = cast(DeformableDETR, Crowded().eval())
    detector.data = DataConfig(eval_scale=16)
    for i in range(2200):
        save_image(tmp_path / "in" / f"{i}.bmp", red=(0, 0, 20, 20))

    def peak(count: int, name: str) -> int:
        paths = [tmp_path / "in" / f"{i}.bmp" for i in range(count)]
        tracemalloc.start()
        write_predictions(
            detector, paths, tmp_path / name, thresholds={"cat": 0.95, "dög": 0.95}, draw=False,
            table=True,
        )  # fmt: skip
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(10, "warm")
    growth = (peak(2200, "many") - peak(200, "few")) / 2000
    assert growth < 1500, "bytes per image: names and sizes; its boxes alone are over 10,000"
