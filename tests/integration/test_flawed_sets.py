"""Random flawed sets of every format through `check`, `train` and `eval`, both splits flawed.

The oracle for sound images is `eval` of the same checkpoint on the set without flaws.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.checks.kinds import KINDS
from datasets.formats.registry import read_source
from main import main
from tests.integration.conftest import TINY, read_log
from tests.lanes import some
from tests.unit.datasets.formats.flawed_formats import (
    FLAWS,
    FORMATS,
    NUM_IMAGES,
    SPLITS,
    add_flaws,
    sound_images,
    write_sound,
)

Detections = dict[str, list[tuple[int, float, list[float]]]]
SMALL = ("--train_scales", "32", "--eval_scale", "32", "--max_size", "48", "--num_workers", "0")


def run(command: str, *options: object, code: int = 0) -> None:
    assert main([command, *map(str, options)]) == code


def located(target: str, place: Path) -> tuple[object, ...]:
    return ("--data_format", target, "--data_path", place)


def train(target: str, place: Path, folder: Path) -> None:
    """Train for an epoch of one step, which uses every image."""
    run("train", "--config", TINY, *located(target, place), *SMALL, "--epochs", 1,
        "--batch_size", NUM_IMAGES, "--no_random_crop", "--output_dir", folder, "--num_images", 0,
        "--no_probe", "--no_tensorboard", "--device", "cpu")  # fmt: skip


def evaluate(target: str, place: Path, checkpoint: Path, folder: Path) -> None:
    run("eval", "--checkpoint", checkpoint, *located(target, place), "--batch_size", 1,
        "--num_workers", 0, "--output_dir", folder, "--device", "cpu")  # fmt: skip


def detections(target: str, place: Path, folder: Path) -> Detections:
    """Return what `eval` found, by image name without suffix."""
    content = read_source(target, place, "val").content
    name_of = {i["id"]: Path(i["file_name"]).stem for i in content["images"] if "file_name" in i}
    found: Detections = {}
    for entry in json.loads((folder / "eval" / "detections.json").read_text()):
        key = (entry["category_id"], entry["score"], entry["bbox"])
        found.setdefault(name_of[entry["image_id"]], []).append(key)
    return found


def findings(report: dict[str, Any]) -> Counter[str]:
    return Counter({f["kind"]: f["count"] for f in report["findings"]})


@pytest.fixture(scope="module", params=some(FORMATS, "voc"))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Detections]:
    """A format, a checkpoint trained on the sound set, and what it finds there."""
    target: str = request.param
    folder = tmp_path_factory.mktemp("sound")
    place = write_sound(folder, target)
    run("check", *located(target, place), *SMALL)
    train(target, place, folder / "run")
    checkpoint = folder / "run" / "last.pth"
    evaluate(target, place, checkpoint, folder / "eval")
    found = detections(target, place, folder / "eval")
    assert len(found) == NUM_IMAGES
    return target, checkpoint, found


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_flawed_sets_are_reported_and_used(
    trained: tuple[str, Path, Detections],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    target, checkpoint, sound = trained
    folder = tmp_path_factory.mktemp("flawed")
    place = write_sound(folder, target)
    flaws = st.lists(st.integers(0, len(FLAWS[target]) - 1), max_size=NUM_IMAGES - 1)
    chosen: dict[str, Sequence[int]] = {s: data.draw(flaws, label=s) for s in SPLITS}
    expected = {s: add_flaws(target, place, s, chosen[s]) for s in SPLITS}
    everything = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}

    flawed = sum((expected[s].check for s in SPLITS), Counter())
    run("check", *located(target, place), *SMALL, "--output_dir", folder / "check",
        code=1 if flawed else 0)  # fmt: skip
    written = json.loads((folder / "check" / "check.json").read_text())
    counts = Counter({f["kind"]: f["count"] for f in written["findings"]})
    assert {kind: n for kind, n in counts.items() if not KINDS[kind].note} == flawed

    train(target, place, folder / "run")
    report = json.loads((folder / "run" / "data_report.json").read_text())
    for split in SPLITS:
        counts = findings(report[split])
        assert counts.pop("no_boxes", 0) >= expected[split].training["no_boxes"]
        assert counts == expected[split].training - Counter(no_boxes=10)
    last = read_log(folder / "run")[-1]
    assert math.isfinite(last["train_loss"])
    assert last["train_unreadable_images"] == expected["train"].unreadable
    assert len(report["train"].get("unreadable_in_training", ())) == expected["train"].unreadable

    evaluate(target, place, checkpoint, folder / "eval")
    found = detections(target, place, folder / "eval")
    for name in sound_images("val", len(chosen["val"])):
        assert found[name] == sound[name]
    assert "Traceback" not in "".join(capsys.readouterr())
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == everything
