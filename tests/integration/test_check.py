"""`main.py check` as a user runs it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from main import main
from tests.integration.conftest import TINY, Cli
from tests.unit.datasets.checks.flawed import FLAWS, FlawedSet
from tests.unit.datasets.formats.flawed_formats import SPLITS, add_flaws, write_sound

FLAWED = ("missing", "cut", "off", "past", "duplicate", "annotation id")


@pytest.fixture
def data(tmp_path: Path) -> FlawedSet:
    found = FlawedSet(tmp_path / "images", 12, seed=5)
    for name in FLAWED:
        FLAWS[name](found)
    found.save(tmp_path / "set.json")
    return found


def arguments(data: FlawedSet, file: Path) -> list[str]:
    return ["check", "--train_images", str(data.folder), "--train_annotations", str(file),
            "--train_scales", "64", "--max_size", "96", "--num_workers", "0"]  # fmt: skip


def test_flaws_are_reported_and_the_fixed_copy_trains(
    cli: Cli, data: FlawedSet, tmp_path: Path
) -> None:
    original = (tmp_path / "set.json").read_bytes()
    done = cli(*arguments(data, tmp_path / "set.json"), "--output_dir", tmp_path / "out",
               "--fix", tmp_path / "fixed.json")  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Wrong: 6 in 6 kinds." in done.stdout
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert {f["kind"]: f["count"] for f in written["findings"]} == dict(data.expected)
    assert "data:image/jpeg" in (tmp_path / "out" / "check.html").read_text()
    why = {reason for change in json.loads((tmp_path / "fixed.changes.json").read_text())
           for reason in change["why"]}  # fmt: skip
    assert set(data.expected) <= why
    assert (tmp_path / "set.json").read_bytes() == original

    assert main([*arguments(data, tmp_path / "fixed.json"), "--output_dir",
                 str(tmp_path / "out")]) == 0  # fmt: skip
    assert json.loads((tmp_path / "out" / "check.json").read_text())["healthy"]

    places = [
        f"--{split}_{what}" for split in ("train", "val") for what in ("images", "annotations")
    ]
    paths = [data.folder, tmp_path / "fixed.json"] * 2
    located = [word for pair in zip(places, paths, strict=True) for word in pair]
    done = cli("train", "--config", TINY, *located, "--output_dir", tmp_path / "run",
               "--max_steps", "1", "--no_probe", "--no_tensorboard")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert not report["train"]["findings"]


def test_nothing_is_overwritten(
    data: FlawedSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    command = arguments(data, tmp_path / "set.json")
    assert main([*command, "--fix", str(tmp_path / "set.json")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    (tmp_path / "check.json").write_text("{}")
    assert main([*command, "--output_dir", str(tmp_path)]) == 2
    assert "holds another file called" in capsys.readouterr().err
    (tmp_path / "check.json").unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_unwritable_outputs_are_reported_before_decoding(
    data: FlawedSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments(data, tmp_path / "set.json"), "--output_dir", str(tmp_path / "out")]
    for fix in (tmp_path / "set.json" / "x.json", tmp_path / "out" / "check.json"):
        assert main([*command, "--fix", str(fix)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --fix {fix}: ")
        assert error.count("\n") == 1, "nothing was decoded"
    (tmp_path / "out" / "check.html").mkdir()
    assert main(command) == 2
    assert "holds another file called" in capsys.readouterr().err


def test_changes_are_json_even_with_non_finite_numbers(data: FlawedSet, tmp_path: Path) -> None:
    boxes = [a for a in data.content["annotations"] if isinstance(a, dict)]
    boxes[-1].update(bbox=[float("nan"), 1, 2, 3])
    data.save(tmp_path / "set.json")
    fix = tmp_path / "new" / "fixed.json"
    assert main([*arguments(data, tmp_path / "set.json"), "--fix", str(fix)]) == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = fix.with_name("fixed.changes.json").read_text()
    changes = json.loads(text, parse_constant=refuse)
    assert ["NaN", 1, 2, 3] in [change.get("entry", {}).get("bbox") for change in changes]
    assert len(text.splitlines()) == len(changes) + 2


@pytest.mark.parametrize("data_format", ["voc", "yolo"])
def test_copies_of_both_splits_of_other_formats_pass(data_format: str, tmp_path: Path) -> None:
    place = write_sound(tmp_path, data_format)
    for split in SPLITS:
        add_flaws(data_format, place, split, [1, 4])
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    common = ["check", "--train_scales", "64", "--max_size", "96", "--num_workers", "0"]
    fix = str(tmp_path / "fixed.json")
    given = ["--data_format", data_format, "--data_path", str(place), "--fix", fix]
    assert main([*common, *given]) == 1
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    located = []
    for split in SPLITS:
        images = place / ("JPEGImages" if data_format == "voc" else f"images/{split}")
        file = tmp_path / f"fixed.{split}.json"
        located += [f"--{split}_images", str(images), f"--{split}_annotations", str(file)]
    assert main([*common, *located]) == 0


def test_user_errors_are_printed_on_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["check"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "set.json").write_text("[1]")
    command = ["check", "--val_images", str(tmp_path), "--val_annotations"]
    assert main([*command, str(tmp_path / "set.json")]) == 2
    assert "must hold a JSON object" in capsys.readouterr().err


def test_both_splits_of_a_sound_set(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--coco_path", str(shapes), "--num_workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "train: 16 images" in printed
    assert "val: 7 images" in printed
