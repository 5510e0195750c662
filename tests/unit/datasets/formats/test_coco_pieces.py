"""A file that is parsed in pieces is what it is when parsed as a whole, errors included."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import index as index_module
from datasets.formats import coco_pieces
from datasets.formats.coco_pieces import Pieces, Unsuitable, read_pieces
from datasets.formats.registry import USUAL, Reading
from datasets.index import CocoIndex
from tests.unit.datasets.test_index_cache import Content, plain
from util.errors import DataError

TEXTS = st.text(st.sampled_from('a}{],[": é😀\\\n'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**6) | st.floats(0, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), max_size=12)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(coco_pieces, "_PIECE", 64)
    return monkeypatch


@settings(max_examples=60)
@given(
    sections=st.dictionaries(st.sampled_from(["images", "annotations", "info", "x"]), VALUES),
    annotations=OBJECTS,
    indent=st.sampled_from([None, 1, 4]),
    ascii_only=st.booleans(),
    piece=st.sampled_from([1, 20, 64, 1000]),
)
def test_any_file_has_the_same_content(
    tmp_path_factory: pytest.TempPathFactory,
    sections: dict[str, Any],
    annotations: list[dict[str, Any]],
    indent: int | None,
    ascii_only: bool,
    piece: int,
) -> None:
    content = {**sections, "annotations": annotations}
    path = tmp_path_factory.mktemp("pieces") / "file.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_pieces, "_PIECE", piece)
        try:
            found = read_pieces(path, "annotations", len)
        except Unsuitable:  # only for what is no list of objects
            others = [v for v in sections.values() if isinstance(v, list)]
            assert any(not isinstance(item, dict) for other in others for item in other)
            return
        listed = found["annotations"]
        assert isinstance(listed, Pieces)
        assert {**found, "annotations": list(listed)} == content
        assert [listed[i] for i in range(-len(listed), 0)] == annotations
        assert listed[1:7:2] == annotations[1:7:2]
        assert sum(listed.parts) == len(listed)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"annotations": [', '{"annotations": [{}', '{"annotations": [{}]',
        '{"annotations": [{},]}', '{"annotations": [{}{}]}', '{"annotations": [{}],}',
        '{"annotations": [{}]} x', '{"annotations": [{}], "annotations": []}', '{"a" [{}]}',
        '{"annotations": [{"a": 1}}', '{1: 2}', '{"a": nul}', "\ufeff{}",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("small_pieces")
def test_what_is_no_sound_json_is_left_to_the_whole_reading(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Unsuitable):
        read_pieces(path, "annotations", len)
    path.write_bytes(text.encode() + b'{"annotations": [{"a": "\xff"}]}')
    with pytest.raises(Unsuitable):
        read_pieces(path, "annotations", len)


def both_ways(path: Path, patch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Return what is read as a whole and in pieces, or the error."""
    found: list[Any] = []
    for large in (1 << 60, 0):
        patch.setattr(index_module, "_LARGE", large)
        try:
            found.append(plain(CocoIndex.load(path, None, need_boxes=True, **options)))
        except DataError as error:
            found.append(str(error))
    return found


CHANGES: list[dict[str, Any]] = [
    {}, {"id": "7"}, {"id": None}, {"id": 0}, {"id": 3.0}, {"id": 2**70}, {"image_id": 77},
    {"image_id": "5"}, {"image_id": [1]}, {"category_id": 9}, {"category_id": True},
    {"bbox": [1, 2, 3]}, {"bbox": ["1", 2, 3, 4]}, {"bbox": None}, {"bbox": [1, 2, 0, 4]},
    {"bbox": [1, 2, float("nan"), 4]}, {"area": None}, {"area": "12"}, {"area": -1},
    {"iscrowd": 1}, {"iscrowd": None}, {"iscrowd": "0"}, {"iscrowd": 2}, {"ignore": 1},
    {"ignore": None}, {"attributes": {"rotation": 30.0}}, {"attributes": []},
    {"bbox": [], "segmentation": [[1, 1, 9, 1, 9, 8]]},
    {"segmentation": {"size": [30, 40], "counts": "}, {"}}, {"parts": [{"a": 1}, {"b": 2}]},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("reading", [USUAL, Reading(crowd="as_objects", ignore_key="drop")])
def test_every_flaw_is_reported_as_in_a_whole_file(
    content: Content,
    tmp_path: Path,
    small_pieces: pytest.MonkeyPatch,
    change: dict[str, Any],
    reading: Reading,
) -> None:
    whole = [{**box, "id": 3 * i + box["id"]} for i in range(4) for box in content["annotations"]]
    whole[7].update(change)
    path = tmp_path / "file.json"
    path.write_text(json.dumps({**content, "annotations": whole}))
    as_whole, in_pieces = both_ways(path, small_pieces, reading=reading)
    assert in_pieces == as_whole
    assert isinstance(as_whole, dict)


@pytest.mark.parametrize("annotations", [[], [1], ["x"], [None, {}], {}, None])
def test_lists_that_hold_no_annotation(
    content: Content, tmp_path: Path, small_pieces: pytest.MonkeyPatch, annotations: Any
) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({**content, "annotations": annotations}))
    as_whole, in_pieces = both_ways(path, small_pieces)
    assert in_pieces == as_whole


def test_a_large_file_is_kept_like_any_other(
    content: Content, tmp_path: Path, small_pieces: pytest.MonkeyPatch
) -> None:
    small_pieces.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_pieces.setattr(index_module, "_MIN_BYTES", 0)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    as_whole, in_pieces = both_ways(path, small_pieces, cache=True)
    assert in_pieces == as_whole
    assert len(list(index_module.cache_folder().iterdir())) == 1
    small_pieces.setattr(index_module, "check_content", None)  # calling it would fail
    assert both_ways(path, small_pieces, cache=True) == [as_whole, as_whole]
