"""Known numbers of every flaw are counted to the one, sound images never named, copies clean."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.checks.boxes import find_layout
from datasets.checks.diagnosis import Diagnosis, corrected, examine
from datasets.checks.images import examine_file, scan
from datasets.checks.kinds import KINDS, tables
from datasets.checks.report import page, summary
from datasets.dataset import CocoDetection
from datasets.formats.registry import Source, read_source
from datasets.index import CocoIndex
from datasets.transforms import EvalTransform
from tests.unit.datasets.checks.flawed import (
    BOXES,
    FLAWS,
    LAYOUTS,
    LIMITS,
    FlawedSet,
    change_all,
    cut,
)
from tests.unit.datasets.formats.flawed_formats import FLAWS as FLAWS_BY_FORMAT
from tests.unit.datasets.formats.flawed_formats import FORMATS, write_sound
from util.errors import DataError

SLOW_FOLDERS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
_NOTES = {kind for kind in KINDS if KINDS[kind].note}
PLAIN = EvalTransform(eval_scale=16, max_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
Boxes = dict[str, list[tuple[str, tuple[float, ...]]]]


def check(**sources: Source) -> Diagnosis:
    return examine(sources, LIMITS, processes=1)


def counts(diagnosis: Diagnosis) -> dict[str, int]:
    return {kind: len(found) for kind, found in diagnosis.findings.items()}


def boxes_of(source: Source) -> Boxes:
    """Return the boxes that training gets, by file name."""
    index = CocoIndex.from_source(source, need_boxes=True)
    found: Boxes = {}
    for i, name in enumerate(index.images.file_names):
        part = slice(index.first[i], index.first[i + 1])
        labels = [index.classes.names[k] for k in index.labels[part]]
        rounded = [tuple(np.round(box, 3).tolist()) for box in index.boxes[part]]
        found[name] = sorted(zip(labels, rounded, strict=True))
    return found


@pytest.mark.long
@settings(max_examples=25, deadline=None, suppress_health_check=SLOW_FOLDERS)
@given(
    seed=st.integers(0, 2**32 - 1),
    flaws=st.dictionaries(st.sampled_from(sorted(FLAWS)), st.integers(1, 2), max_size=12),
    leaks=st.integers(0, 2),
)
def test_counts_are_exact_and_a_corrected_copy_is_clean(
    tmp_path_factory: pytest.TempPathFactory, seed: int, flaws: dict[str, int], leaks: int
) -> None:
    root = tmp_path_factory.mktemp("set")
    data = FlawedSet(root / "train", 28, seed)
    val = FlawedSet(root / "val", 3, seed + 1, first_id=7)
    for name in FLAWS:  # in their order there
        for _ in range(flaws.get(name, 0)):
            FLAWS[name](data)
    for k in range(leaks):
        source = data.folder / data.take()["file_name"]
        (val.folder / val.content["images"][k]["file_name"]).write_bytes(source.read_bytes())
        data.expected["leak"] += 1
    train, other = data.source(), val.source()

    diagnosis = check(train=train, val=other)
    assert counts(diagnosis) == dict(data.expected)
    named = {o.image_id for found in diagnosis.findings.values() for o in found}
    assert named <= data.flawed | {None, 99999}

    content, changes = corrected(diagnosis.splits[0])
    repaired = Source(json.loads(json.dumps(content)), train.image_dir, train.place)
    again = check(train=repaired, val=other)
    assert {k for k in again.findings if not KINDS[k].note} <= {"too_many_boxes"}
    assert changes or not set(data.expected) - {"too_many_boxes"} - _NOTES
    sound = boxes_of(Source(data.sound, train.image_dir, train.place))
    trained = boxes_of(repaired)
    for image in data.sound["images"]:
        if image["id"] not in data.flawed:
            assert trained[image["file_name"]] == sound[image["file_name"]]


def test_boxes_are_left_out_for_the_reason_that_their_image_is(tmp_path: Path) -> None:
    """The size is not stated either, but that alone would be fixed."""
    data = FlawedSet(tmp_path / "train", 12, 0)
    image = data.take()
    del image["width"]
    cut(data.folder / image["file_name"])
    _, changes = corrected(check(train=data.source()).splits[0])
    why = [change["why"] for change in changes if change["section"] == "annotations"]
    assert why == [["truncated_image"]] * BOXES


@pytest.mark.parametrize(("images", "scale", "told"), [(20, 0.5, 1), (20, 0.7, 0), (9, 0.5, 0)])
def test_boxes_of_smaller_images_are_noticed(
    tmp_path: Path, images: int, scale: float, told: int
) -> None:
    """Boxes from corner to corner, as of images of half the size; of 9 images there are too few."""
    data = FlawedSet(tmp_path / "train", images, seed=0)
    change_all(data, lambda box: [scale * value for value in box])
    found = check(train=data.source()).findings
    assert len(found.get("corner_bbox", ())) == told
    if told:
        assert found["corner_bbox"][0].detail == (
            "none reaches past 50% of the width and 50% of the height"
        )
    kinds = [f.kind for f in CocoIndex.from_source(data.source(), need_boxes=True).findings]
    assert ("corner_bbox" in kinds) == bool(told), "training reports it, too"


@pytest.mark.parametrize("flaw", sorted(FLAWS))
def test_each_flaw_alone_is_the_only_one_found(flaw: str, tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 4, seed=1)
    FLAWS[flaw](data)
    diagnosis = check(train=data.source())
    assert counts(diagnosis) == dict(data.expected)
    assert diagnosis.healthy == (set(data.expected) <= _NOTES)


def test_a_sound_set_is_healthy(tmp_path: Path) -> None:
    diagnosis = check(train=FlawedSet(tmp_path / "train", 6, seed=3).source())
    assert diagnosis.healthy
    assert not diagnosis.findings
    assert "Nothing is wrong." in summary(diagnosis)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("seed", range(3))
def test_boxes_in_another_layout_are_reported_and_fixed(
    layout: str, seed: int, tmp_path: Path
) -> None:
    data = FlawedSet(tmp_path / "train", 8, seed)
    expected = boxes_of(data.source())
    kind, change = LAYOUTS[layout]
    change_all(data, change)
    diagnosis = check(train=data.source())
    assert counts(diagnosis) == {kind: 24}
    content, changes = corrected(diagnosis.splits[0])
    assert len(changes) == 24
    repaired = Source(content, data.folder, data.folder)
    assert check(train=repaired).healthy
    assert boxes_of(repaired) == expected


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 60),
    outside=st.floats(0, 0.15),
)
def test_sound_boxes_are_never_taken_for_another_layout(
    seed: int, count: int, outside: float
) -> None:
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.uniform(0, 100, (2, count, 2)), axis=0)
    boxes = np.concatenate([low, high - low], axis=1)
    boxes[: int(outside * count), :2] += 50
    assert find_layout(boxes, np.full((count, 2), 100.0), slack=1) == "xywh"


def test_parallel_decoding_finds_what_one_process_finds(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 70, seed=0)
    for name in ("missing", "no image", "cut", "turned"):
        FLAWS[name](data)
    files = [data.folder / f"p{100 + i}.png" for i in range(70)]
    found = scan(files, processes=2)
    assert found == {path: examine_file(path) for path in files}
    states = Counter(facts.state for facts in found.values())
    assert states == {"sound": 67, "missing": 1, "unreadable": 1, "truncated": 1}


@pytest.mark.long
def test_decoding_processes_that_are_no_copies_have_the_same_limit_of_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows and macOS, where none is forked."""
    files = [tmp_path / f"{i}.png" for i in range(70)]
    Image.new("RGB", (20, 10)).save(files[0])
    for file in files[1:]:
        os.link(files[0], file)
    monkeypatch.setattr("datasets.checks.images._START", "spawn")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    found = scan(files, processes=2)
    assert {facts.state for facts in found.values()} == {"unreadable"}
    assert "`max_pixels`" in found[files[0]].error


@pytest.mark.skipif(sys.platform != "linux", reason="watches processes in /proc")
def test_decoding_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    names = [tmp_path / f"{i}.png" for i in range(3000)]  # a minute of decoding
    Image.new("RGB", (2000, 2000)).save(names[0])
    for name in names[1:]:
        os.link(names[0], name)
    code = (
        "import sys; from pathlib import Path; from datasets.checks.images import scan\n"
        "scan(sorted(Path(sys.argv[1]).iterdir()), processes=2)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as main:
        children = Path(f"/proc/{main.pid}/task/{main.pid}/children")
        while main.poll() is None and not children.read_text():
            time.sleep(0.05)
        assert main.poll() is None
        main.kill()
        main.communicate(timeout=20)  # ends when no process has the pipe any more


def test_boxes_of_images_that_cannot_be_decoded_are_not_usable(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 3, seed=0)
    FLAWS["missing"](data)
    FLAWS["cut"](data)
    told = check(train=data.source()).to_json()["splits"]["train"]
    assert told["usable_boxes"] == BOXES
    assert told["boxes_by_class"] == {"cat": 2, "dog": 1}


def test_classes_of_splits_are_paired_as_training_pairs_them(tmp_path: Path) -> None:
    train = FlawedSet(tmp_path / "train", 2, seed=0)
    val = FlawedSet(tmp_path / "val", 2, seed=1)
    # The same names under each other's ids.
    val.content["categories"] = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    assert not check(train=train.source(), val=val.source()).findings

    for annotation in train.content["annotations"]:
        annotation["category_id"] = 3
    found = check(train=train.source(), val=val.source()).findings
    assert [(o.place, o.detail) for o in found["unseen_class"]] == [("dog", "id 3")]
    assert "unknown_class" not in found

    val.content["categories"].append({"id": 9, "name": "wolf"})
    assert "unknown_class" not in check(train=train.source(), val=val.source()).findings
    val.add_box(val.content["images"][0]["id"], 9, [1, 2, 20, 20])
    found = check(train=train.source(), val=val.source()).findings
    assert [(o.split, o.place) for o in found["unknown_class"]] == [("val", "wolf")]
    indices = [CocoIndex.from_source(s.source(), need_boxes=True) for s in (train, val)]
    with pytest.raises(DataError, match="wolf"):  # as training would
        CocoDetection(indices[1], PLAIN, classes=indices[0].classes)


def test_names_of_classes_in_two_spellings_are_reported(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 3, seed=0)
    names = ("cat", "dog", "Cat", "street lamp", "Street_Lamp", "street-lamp", "C", "C++")
    data.content["categories"] = [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(names)]
    found = check(train=data.source()).findings["alike_name"]
    assert [(one.place, one.detail) for one in found] == [
        ("Cat", "as 'cat'"),
        ("Street_Lamp", "as 'street lamp'"),
        ("street-lamp", "as 'street lamp'"),
    ]


def test_fractions_are_all_fixed_though_a_few_exceed_the_image(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 8, seed=0)
    expected = boxes_of(data.source())
    change_all(data, LAYOUTS["fractions of corners"][1])
    last = data.content["annotations"][-1]["bbox"]
    last[2] = 1.02  # a pixel and a bit past the right edge
    diagnosis = check(train=data.source())
    assert counts(diagnosis)["normalised_bbox"] == 24
    repaired = boxes_of(Source(corrected(diagnosis.splits[0])[0], data.folder, data.folder))
    assert repaired == expected


def test_names_that_no_terminal_can_show_do_not_end_it(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 2, seed=0)
    name = os.fsdecode(b"caf\xe9.png")  # as an archive of another system leaves it
    for image in data.content["images"]:
        shutil.copy(data.folder / "p100.png", data.folder / f"x{image['id']}{name}")
        image["file_name"] = f"x{image['id']}{name}"
    diagnosis = check(train=data.source(), val=data.source())
    assert {"duplicate_image", "leak"} <= set(diagnosis.findings)
    summary(diagnosis).encode()
    page(diagnosis, title="names").encode()


def test_every_kind_is_documented_as_it_is() -> None:
    text = (Path(__file__).parents[4] / "docs" / "data.md").read_text()
    assert tables() in text
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row in KINDS] == list(KINDS)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif", "avif"])
def test_damaged_files_are_distinguished_from_sound_ones(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    try:
        Image.fromarray(pixels).save(path)
    except (KeyError, ValueError):
        pytest.skip(f"this Pillow writes no {suffix}")
    whole = path.read_bytes()
    facts = examine_file(path)
    assert (facts.state, facts.size) == ("sound", (24, 32))
    for length in range(0, len(whole) - 2, max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        assert examine_file(path).state in ("unreadable", "truncated"), length
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        assert examine_file(path).state in ("unreadable", "truncated", "sound")


def test_the_original_content_is_not_touched(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 10, seed=0)
    for name in ("size", "past", "annotation id", "iscrowd", "repeated id"):
        FLAWS[name](data)
    before = json.dumps(data.content)
    corrected(check(train=data.source()).splits[0])
    assert json.dumps(data.content) == before


@pytest.mark.long
@pytest.mark.parametrize("target", FORMATS)
def test_each_flaw_of_each_format_is_found_and_fixed(target: str, tmp_path: Path) -> None:
    sound = write_sound(tmp_path, target)
    assert check(train=read_source(target, sound, "train")).healthy
    for number, flaw in enumerate(FLAWS_BY_FORMAT[target]):
        place = tmp_path / str(number)
        shutil.copytree(sound, place)
        told = flaw(target, place, 1)
        source = read_source(target, place, "train")
        diagnosis = check(train=source)
        wrong = {kind: n for kind, n in counts(diagnosis).items() if not KINDS[kind].note}
        assert wrong == told.check
        assert diagnosis.healthy == (not told.check)
        page(diagnosis, title=target)
        repaired, _ = corrected(diagnosis.splits[0])
        assert check(train=Source(repaired, source.image_dir, place)).healthy, told


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_FOLDERS)
@given(draw=st.data(), value=JSON)
def test_any_value_anywhere_is_reported(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject, value: object
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        FlawedSet(folder, 3, seed=0).save(folder / "set.json")
    content = json.loads((folder / "set.json").read_text())
    section = draw.draw(st.sampled_from(["images", "annotations", "categories", None]))
    if section is None:
        content[draw.draw(st.sampled_from(sorted(content)))] = value
    else:
        entry = draw.draw(st.integers(0, len(content[section]) - 1))
        key = draw.draw(st.sampled_from([None, *content[section][entry]]))
        if key is None:
            content[section][entry] = value
        else:
            content[section][entry][key] = value
    diagnosis = check(train=Source(content, folder, folder))
    with pytest.MonkeyPatch.context() as patch:
        # writing each chart as SVG would take a minute, and depends on nothing but counts
        patch.setattr("datasets.checks.report.svg", lambda chart, description: description)
        (summary(diagnosis) + page(diagnosis, title="any")).encode()
    json.dumps(diagnosis.to_json())
    repaired, _ = corrected(diagnosis.splits[0])
    wrong = {k for k in check(train=Source(repaired, folder, folder)).findings if not KINDS[k].note}
    assert wrong <= {"missing_section"}


def test_page_and_summary_escape_and_name_everything(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "train", 40, seed=2)
    for flaw in FLAWS.values():
        flaw(data)
    data.content["categories"][0]["name"] = "<script>alert(1)</script>"
    diagnosis = check(train=data.source(), val=data.source())
    html = page(diagnosis, title="a & b")
    assert "<script>" not in html
    assert "a &amp; b" in html
    assert html.count("<img ") == html.count('alt="') > 20
    text = summary(diagnosis)
    for kind, found in diagnosis.findings.items():
        assert f'id="{kind}"' in html
        assert f"{len(found)}  {KINDS[kind].title}" in text
    assert "A corrected copy: clipped." in text
    assert "--" not in text  # an option is the command line's word
    written: dict[str, Any] = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert {f["kind"]: f["count"] for f in written["findings"]} == counts(diagnosis)


def test_lines_that_are_no_boxes_are_found_in_yolo_data(tmp_path: Path) -> None:
    data = FlawedSet(tmp_path / "images" / "train", 2, seed=0)
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    (labels / "p100.txt").write_text("0 0.5 0.5 0.4 0.4\n0 0.5\n1 0.5 0.5 nan 0.2\n")
    (labels / "p101.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    diagnosis = check(train=read_source("yolo", tmp_path, "train"))
    assert counts(diagnosis)["unreadable_annotation"] == 1
    assert counts(diagnosis)["broken_bbox"] == 1
    assert data.folder.is_dir()
