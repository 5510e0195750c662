"""The kept index: the same as one that is read again, and never one of other data or damaged."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets import index as index_module
from datasets.formats.coco_pieces import file_digest
from datasets.formats.registry import Reading
from datasets.index import CocoIndex, cache_folder
from util.errors import DataError

Content = dict[str, Any]
Write = Callable[[Content], tuple[Path, Path]]


@pytest.fixture
def json_path(
    content: Content, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Write a set with a flaw that is large enough to be kept, and give the cache a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_MIN_BYTES", 0)
    content["annotations"][2]["bbox"] = [1, 1, 0]
    content["images"][0]["file_name"] = "ö \ud800.png"
    content["info"] = "\u00e9"
    path, _ = write({**content, "images": content["images"][1:]})
    path.write_text(json.dumps(content))
    return path


def read(path: Path, *, need_boxes: bool = True, cache: bool = True) -> CocoIndex:
    return CocoIndex.load(path, None, need_boxes=need_boxes, cache=cache)


def plain(index: CocoIndex) -> dict[str, Any]:
    found = index.annotations
    return {
        "classes": index.classes.to_json(),
        "images": [index.images.ids.tolist(), list(index.images.file_names)],
        "sizes": index.images.sizes.tolist(),
        "boxes": [found.ids.tolist(), found.image.tolist(), found.labels.tolist()],
        "values": [found.xywh.tolist(), found.area.tolist(), found.crowd.tolist()],
        "notices": [notice.to_json() for notice in index.findings],
    }


def test_kept_content_is_what_was_read(json_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uncached = plain(read(json_path, cache=False))
    assert not cache_folder().exists()
    assert plain(read(json_path)) == uncached
    monkeypatch.setattr(index_module, "check_content", None)  # calling it would fail
    assert plain(read(json_path)) == uncached
    assert len(list(cache_folder().iterdir())) == 1
    index = CocoIndex.load(json_path, json_path.parent / "images", need_boxes=True, cache=True)
    assert index.findings[0].kind == "broken_bbox"


def test_training_and_evaluation_share_what_is_kept(
    json_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncached = plain(read(json_path))
    monkeypatch.setattr(index_module, "check_content", None)  # calling it would fail
    assert plain(read(json_path, need_boxes=False)) == uncached
    assert len(list(cache_folder().iterdir())) == 1


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (None, "there is no list `annotations`"),
        ([], "none of the 0 annotations is a usable box"),
    ],
)
def test_what_evaluation_kept_without_boxes_is_refused_in_training(
    json_path: Path, annotations: list[Any] | None, message: str
) -> None:
    content = json.loads(json_path.read_text())
    json_path.write_text(json.dumps({**content, "annotations": annotations}))
    folder = json_path.parent / "images"
    for _ in range(2):
        index = CocoIndex.load(json_path, folder, need_boxes=False, cache=True)
        assert len(index.annotations.ids) == 0
        with pytest.raises(DataError, match=message):
            CocoIndex.load(json_path, folder, need_boxes=True, cache=True)
    assert len(list(cache_folder().iterdir())) == 1


def test_changed_content_is_read_again(json_path: Path) -> None:
    read(json_path)
    changed = json.loads(json_path.read_text())
    changed["annotations"][0]["bbox"] = [5, 6, 7, 8]
    json_path.write_text(json.dumps(changed))
    assert read(json_path).annotations.xywh[0].tolist() == [5, 6, 7, 8]
    assert len(list(cache_folder().iterdir())) == 2


def test_a_large_file_that_changes_after_its_hash_is_not_kept(
    json_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_LARGE", 0)
    monkeypatch.setattr(index_module, "file_digest", partial(digest_then_exchange, json_path))
    first = json_path.read_bytes()
    assert read(json_path).annotations.xywh[0].tolist() == [5, 6, 7, 8]
    json_path.write_bytes(first)
    monkeypatch.setattr(index_module, "file_digest", file_digest)
    before = read(json_path).annotations.xywh[0].tolist()
    assert before == json.loads(first)["annotations"][0]["bbox"] != [5, 6, 7, 8]


def digest_then_exchange(json_path: Path, path: Path) -> str:
    """Hash a file that another program changes right after."""
    digest = file_digest(path)
    changed = json.loads(json_path.read_text())
    changed["annotations"][0]["bbox"] = [5, 6, 7, 8]
    json_path.write_text(json.dumps(changed, indent=1))
    return digest


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_damaged_files_are_replaced(json_path: Path, damage: str) -> None:
    uncached = plain(read(json_path))
    (file,) = cache_folder().iterdir()
    raw = file.read_bytes()
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
    damaged = {"cut": raw[:-9], "empty": b"", "flipped": flipped, "other": b"x" * 999}[damage]
    file.write_bytes(damaged)
    assert plain(read(json_path)) == uncached
    assert len(file.read_bytes()) == len(raw)


def test_a_folder_that_cannot_be_written_costs_only_time(json_path: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert read(json_path).annotations.ids.tolist() == [0, 1]


def test_many_processes_may_write_at_once(json_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        indices = list(pool.map(read, [json_path] * 16))
    assert all(np.array_equal(index.annotations.ids, [0, 1]) for index in indices)
    assert len(list(cache_folder().iterdir())) == 1


def test_the_oldest_files_go(json_path: Path) -> None:
    content = json.loads(json_path.read_text())
    for number in range(20):
        json_path.write_text(json.dumps({**content, "info": number}))
        read(json_path)
    assert len(list(cache_folder().iterdir())) == 16


def test_cached_text_ids_are_kept_and_flag_meanings_distinguished(
    content: Content, write: Write, json_path: Path
) -> None:
    content["images"][1]["id"] = content["annotations"][1]["image_id"] = "nine"
    content["categories"][0]["id"] = content["annotations"][0]["category_id"] = "seven"
    content["annotations"][2].update(category_id="seven", iscrowd=1, bbox=[1, 1, 5, 5])
    content["images"][0]["file_name"] = "/data/5.png"
    json_path.write_text(json.dumps(content))
    for _ in range(2):
        index = read(json_path)
        assert index.images.texts == {1: "nine"}
        assert index.classes.texts == ("seven", "")
        assert list(index.images.file_names)[0] == "/data/5.png", "without a folder, only a name"
        assert index.annotations.crowd.tolist() == [False, False, True]
    objects = CocoIndex.load(
        json_path, None, need_boxes=True, cache=True, reading=Reading(crowd="as_objects")
    )
    assert not objects.annotations.crowd.any()
    assert len(list(cache_folder().iterdir())) == 2
