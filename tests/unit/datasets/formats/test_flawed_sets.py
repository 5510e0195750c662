"""Random flawed sets in every format: reported, never fatal, and sound images untouched.

Each flaw is put into an image of its own; the first image stays sound. The oracle for sound
images is the same set without flaws.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.dataset import CocoDetection
from datasets.formats.registry import Source, read_source
from datasets.index import CocoIndex
from datasets.transforms import EvalTransform
from engine.evaluation.matching import Truth
from tests.unit.datasets.formats.flawed_formats import (
    FLAWS,
    FORMATS,
    NUM_IMAGES,
    add_flaws,
    content_of,
    sound_images,
    write_sound,
)
from util.batch import UnreadableImage
from util.errors import DataError

Targets = dict[str, list[tuple[str, list[float]]]]
PLAIN = EvalTransform(eval_scale=16, max_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
SOUND = content_of("train")


def load(target: str, place: Path) -> CocoIndex:
    return CocoIndex.from_source(read_source(target, place, "train"), need_boxes=True)


def use(index: CocoIndex) -> tuple[Targets, int]:
    """Do all that a run does; return targets by image, and how many could not be read."""
    assert all("\n" not in line for line in index.notices)
    json.loads(json.dumps(index.data_report()))
    index.report(num_queries=1)
    truth = Truth.of(index)
    assert (truth.image_ids[truth.image] == index.images.ids[index.annotations.image]).all()
    dataset = CocoDetection(index, PLAIN)
    found: Targets = {}
    unreadable = 0
    for i, name in enumerate(index.images.file_names):
        item = dataset[i]
        if isinstance(item, UnreadableImage):
            unreadable += 1
            continue
        labels, boxes = item[1]["labels"].tolist(), item[1]["boxes"].tolist()
        pairs = [(dataset.classes.names[k], box) for k, box in zip(labels, boxes, strict=True)]
        found[Path(name).stem] = sorted(pairs)
    return found, unreadable


@pytest.mark.long
@pytest.mark.parametrize("target", FORMATS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flaws_are_counted_and_sound_images_unaffected(
    tmp_path_factory: pytest.TempPathFactory, target: str, data: st.DataObject
) -> None:
    place = write_sound(tmp_path_factory.mktemp("set"), target)
    expected, unreadable = use(load(target, place))
    assert unreadable == 0
    assert len(expected) == NUM_IMAGES
    chosen = data.draw(st.lists(st.integers(0, len(FLAWS[target]) - 1), max_size=4), label="flaws")
    flaws = add_flaws(target, place, "train", chosen)
    index = load(target, place)
    found, unreadable = use(index)
    assert unreadable == flaws.unreadable
    counts = Counter({finding.kind: finding.count for finding in index.findings})
    # other flaws take boxes, too
    assert counts.pop("no_boxes", 0) >= flaws.training.pop("no_boxes", 0)
    assert counts == flaws.training
    for name in sound_images("train", len(chosen)):
        assert found[name] == expected[name]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@pytest.mark.long
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_in_a_coco_file_is_reported_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: object
) -> None:
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "p0.png").exists():
        for image in SOUND["images"]:
            Image.new("RGB", (40, 30)).save(folder / image["file_name"])
    content = json.loads(json.dumps(SOUND))
    section = data.draw(st.sampled_from(["images", "annotations", "categories", None]))
    if section is None:
        content[data.draw(st.sampled_from(sorted(content)))] = value
    else:
        entry = data.draw(st.integers(0, len(content[section]) - 1))
        key = data.draw(st.sampled_from([None, *content[section][entry]]))
        if key is None:
            content[section][entry] = value
        else:
            content[section][entry][key] = value
    try:
        use(CocoIndex.from_source(Source(content, folder, folder), need_boxes=True))
    except DataError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal


@pytest.mark.long
@pytest.mark.parametrize("target", FORMATS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), junk=st.binary(max_size=8))
def test_any_bytes_in_annotation_files_are_reported_or_refused(
    tmp_path_factory: pytest.TempPathFactory, target: str, data: st.DataObject, junk: bytes
) -> None:
    place = write_sound(tmp_path_factory.mktemp("set"), target)
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix != ".png")
    file = data.draw(st.sampled_from(files))
    raw = file.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = start + data.draw(st.sampled_from([0, 1, 5, 10**9]))
    file.write_bytes(raw[:start] + junk + raw[end:])
    try:
        use(load(target, place))
    except DataError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
