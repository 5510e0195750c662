"""Images that look alike are reported as pairs; others, and flat ones, are not."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter

from datasets.checks.alike import Pair, _distance, find_alike
from datasets.checks.diagnosis import Diagnosis, examine
from datasets.checks.report import page, summary
from datasets.images import SMALL_SIDE, small_grey
from tests.unit.datasets.checks.flawed import LIMITS, FlawedSet

SIZE = (160, 120)
Change = Callable[[Image.Image], Image.Image]


def scene(seed: int) -> Image.Image:
    """Return a photograph, as far as spectra go: large shapes in colour, fine ones on top."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((SIZE[1], SIZE[0], 3))
    for spread in (2, 6, 18):
        noise = rng.normal(size=pixels.shape)
        pixels += gaussian_filter(noise, (spread, spread, 0)) * spread**1.5
    pixels = 128 + 45 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def small(*images: Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    data = b"".join(small_grey(image, 1) for image in images)
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, SMALL_SIDE, SMALL_SIDE)


def best(*images: Image.Image) -> dict[tuple[int, int], Pair]:
    found: dict[tuple[int, int], Pair] = {}
    for pair in find_alike(small(*images)):
        key = (pair.first, pair.second)
        if key not in found or pair.likeness > found[key].likeness:
            found[key] = pair
    return found


CHANGES: dict[str, tuple[Change, bool]] = {
    "half": (lambda im: im.resize((80, 60)), False),
    "square": (lambda im: im.resize((90, 90)), False),
    "darker": (lambda im: ImageEnhance.Brightness(im).enhance(0.75), False),
    "grey": (lambda im: im.convert("L"), False),
    "mirrored": (ImageOps.mirror, True),
    "mirrored, half": (lambda im: ImageOps.mirror(im.resize((80, 60))), True),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
def test_changed_copies_are_found_among_others(name: str) -> None:
    change, mirrored = CHANGES[name]
    originals = [scene(seed) for seed in range(20)]
    found = best(*originals, *map(change, originals))
    assert set(found) == {(i, i + 20) for i in range(20)}
    assert all(pair.is_copy and pair.mirrored == mirrored for pair in found.values())


def test_a_moved_object_makes_no_copy_but_is_alike() -> None:
    first, second = scene(1), scene(1)
    first.paste((190, 190, 190), (20, 20, 36, 36))
    second.paste((190, 190, 190), (30, 20, 46, 36))
    (pair,) = best(first, second).values()
    assert not pair.is_copy
    assert pair.likeness < 1


@pytest.mark.parametrize("size", [10, 14, 24])
def test_a_small_object_elsewhere_makes_no_copy(size: int) -> None:
    """Frames of a still camera, one chess piece on the board: most pixels are equal."""
    first, second = scene(1), scene(1)
    first.paste((90, 90, 90), (20, 20, 20 + size, 20 + size))
    second.paste((90, 90, 90), (90, 70, 90 + size, 70 + size))
    (pair,) = best(first, second).values()
    assert not pair.is_copy
    assert pair.likeness > 0.88


def test_flat_images_are_not_compared() -> None:
    images = [Image.new("RGB", SIZE, (level,) * 3) for level in (0, 90, 91, 255)]
    assert not best(*images)


def test_distances_count_bits() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2**63, (2, 50), dtype=np.uint64)
    expected = [bin(a ^ b).count("1") for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert _distance(first, second).tolist() == expected


@pytest.mark.long
def test_the_search_is_bounded_where_all_images_are_alike() -> None:
    """Frames of a still camera: all pairs would be two million."""
    frame = np.asarray(scene(0).resize((SMALL_SIDE, SMALL_SIDE)).convert("L"))
    rng = np.random.default_rng(0)
    frames = (frame + rng.integers(-1, 2, (2000, *frame.shape))).clip(0, 255).astype(np.uint8)
    start = time.perf_counter()
    found = list(find_alike(frames))
    assert time.perf_counter() - start < 30
    assert {pair.second for pair in found} | {pair.first for pair in found} == set(range(2000))
    assert len(found) <= 2000 * 32 * 2


def two_splits(folder: Path) -> tuple[FlawedSet, FlawedSet]:
    """Return sets of scenes: val's first is a mirrored copy of train's, train has a pair inside."""
    train, val = FlawedSet(folder / "train", 6, 0), FlawedSet(folder / "val", 4, 1, first_id=7)
    for k, image in enumerate(train.content["images"]):
        scene(k).resize((64, 48)).save(train.folder / image["file_name"])
    for k, image in enumerate(val.content["images"]):
        scene(50 + k).resize((64, 48)).save(val.folder / image["file_name"])
    copy = ImageOps.mirror(scene(0)).resize((64, 48))
    copy.save(val.folder / val.content["images"][2]["file_name"])
    scene(3).save(train.folder / train.content["images"][5]["file_name"])
    train.content["images"][5].update(width=SIZE[0], height=SIZE[1])
    return train, val


def diagnosis(train: FlawedSet, val: FlawedSet, *, similar: bool = True) -> Diagnosis:
    """Return what is found, but for the box that is small in the larger image."""
    sources = {"train": train.source(), "val": val.source()}
    found = examine(sources, LIMITS, processes=1, similar=similar)
    kinds = {kind: some for kind, some in found.findings.items() if kind != "small_bbox"}
    return replace(found, findings=kinds)


@pytest.mark.long
def test_pairs_are_reported_with_both_names_and_splits(tmp_path: Path) -> None:
    found = diagnosis(*two_splits(tmp_path))
    assert {kind: len(some) for kind, some in found.findings.items()} == {
        "similar_image": 1, "copied_leak": 1,
    }  # fmt: skip
    assert not found.healthy
    written = json.loads(json.dumps(found.to_json()))["findings"]
    offenders = {kind["kind"]: kind["offenders"][0] for kind in written}
    leak = offenders["copied_leak"]
    assert (leak["split"], leak["place"]) == ("train", "p100.png")
    assert leak["partner"] == {"split": "val", "place": "p9.png", "image_id": 9}
    assert leak["detail"].startswith("like 'p9.png' of val, mirrored (")
    assert offenders["similar_image"]["place"] == "p105.png"
    assert offenders["similar_image"]["partner"]["place"] == "p103.png"
    assert "1  images of train that are copies of one in val" in summary(found)
    assert page(found, title="pairs").count('<figure class="double">') == 2


def test_a_copy_with_objects_of_other_classes_is_alike_only(tmp_path: Path) -> None:
    train, val = two_splits(tmp_path)
    annotations = val.content["annotations"]
    annotations.append({**annotations[0], "id": 10**6, "image_id": 9})
    found = diagnosis(train, val)
    assert {kind: len(some) for kind, some in found.findings.items()} == {
        "similar_image": 1, "similar_leak": 1,
    }  # fmt: skip


@pytest.mark.long
def test_the_page_shows_both_images_of_a_pair(tmp_path: Path) -> None:
    html = page(diagnosis(*two_splits(tmp_path)), title="pairs")
    section = html.partition('<section id="copied_leak">')[2].partition("</section>")[0]
    assert 'width="608"' in section  # two of 300 pixels, and what is between


def test_identical_files_are_reported_once_as_such(tmp_path: Path) -> None:
    train, val = two_splits(tmp_path)
    names = [s.folder / s.content["images"][k]["file_name"] for s, k in ((train, 0), (val, 2))]
    names[1].write_bytes(names[0].read_bytes())
    found = diagnosis(train, val).findings
    assert len(found["leak"]) == 1
    assert "copied_leak" not in found


def test_without_the_search_nothing_of_it_is_reported(tmp_path: Path) -> None:
    assert not diagnosis(*two_splits(tmp_path), similar=False).findings


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_no_pair(count: int) -> None:
    small = np.zeros((count, SMALL_SIDE, SMALL_SIDE), dtype=np.uint8)
    assert not list(find_alike(small))
