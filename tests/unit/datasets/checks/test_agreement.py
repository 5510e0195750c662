"""Training and `check` report the same flaws: the same kinds, counts and file names."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.checks.diagnosis import examine
from datasets.formats.registry import Source, read_source
from datasets.index import CocoIndex
from tests.unit.datasets.checks.flawed import FLAWS, LAYOUTS, LIMITS, FlawedSet, change_all
from tests.unit.datasets.formats.flawed_formats import FLAWS as FLAWS_BY_FORMAT
from tests.unit.datasets.formats.flawed_formats import FORMATS, add_flaws, write_sound

# What only decoding, other splits, the rest of the folder or the model's limits can show.
CHECK_ALONE = {
    "truncated_image",
    "duplicate_image",
    "exif_rotated",
    "exif_ambiguous",
    "unused_file",
    "repeated_bbox",
    "vanishing_bbox",
    "small_bbox",
    "too_many_boxes",
    "empty_class",
    "repeated_name",
    "alike_name",
}
REFUSED = {"bad category"}  # by training, in one line
Reported = dict[str, tuple[int, set[str]]]


def by_check(source: Source) -> Reported:
    """Return the count of each kind that training reports too, and where it is."""
    written = examine({"train": source}, LIMITS, processes=1).to_json()
    assert isinstance(json.loads(json.dumps(written)), dict)
    return {
        found["kind"]: (found["count"], {o["place"] for o in found["offenders"]})
        for found in written["findings"]
        if found["kind"] not in CHECK_ALONE
    }


def by_training(source: Source) -> Reported:
    """Return the same from what becomes data_report.json, whose ids stand for files."""
    report = CocoIndex.from_source(source, need_boxes=True).data_report()
    return {
        found["kind"]: (found["count"], places(found, source))
        for found in json.loads(json.dumps(report))["findings"]
    }


def places(found: dict[str, Any], source: Source) -> set[str]:
    """Return where a finding is, as `check` names it."""
    if "places" in found:
        return set(found["places"])
    images = list(enumerate(source.content["images"]))
    if "image_ids" in found:
        entries = found["kind"] in ("no_file_name", "repeated_image")
        named = {
            f"images[{row}]" if entries else image["file_name"]
            for row, image in images
            if image.get("id") in found["image_ids"]
        }
        first = {
            f"images[{row}]" for row, image in images if image in source.content["images"][:row]
        }
        return named & first if found["kind"] == "repeated_image" else named
    name_of = {image.get("id"): image.get("file_name") for _, image in images}
    return {
        name_of.get(entry.get("image_id"), f"annotations[{row}]")
        for row, entry in enumerate(source.content["annotations"])
        if isinstance(entry, dict) and entry.get("id") in found["annotation_ids"]
    }


@pytest.mark.long
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1),
    flaws=st.lists(st.sampled_from(sorted(FLAWS.keys() - REFUSED)), max_size=16),
    layout=st.sampled_from([None, *sorted(LAYOUTS)]),
)
def test_training_and_check_agree_on_random_flawed_sets(
    tmp_path_factory: pytest.TempPathFactory, seed: int, flaws: list[str], layout: str | None
) -> None:
    data = FlawedSet(tmp_path_factory.mktemp("set") / "train", 24, seed)
    if layout is not None and not layout.startswith("fraction"):  # training refuses fractions
        change_all(data, LAYOUTS[layout][1])
    for name in FLAWS:  # in their order there
        for _ in range(flaws.count(name)):
            FLAWS[name](data)
    assert by_training(data.source()) == by_check(data.source())


@pytest.mark.long
@pytest.mark.parametrize("target", sorted(FORMATS))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_training_and_check_agree_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, target: str, data: st.DataObject
) -> None:
    place = write_sound(tmp_path_factory.mktemp("set"), target)
    some = st.lists(st.integers(0, len(FLAWS_BY_FORMAT[target]) - 1), max_size=4)
    add_flaws(target, place, "train", data.draw(some))
    source = read_source(target, place, "train")
    trained, checked = by_training(source), by_check(source)
    assert {kind: count for kind, (count, _) in trained.items()} == {
        kind: count for kind, (count, _) in checked.items()
    }
