"""Our matching and accumulation against pycocotools, to the last digit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from engine.evaluation import matching
from engine.evaluation.evaluator import Evaluator
from engine.evaluation.matching import Detections, overlaps
from tests.unit.engine.evaluation.shared import both, detections_of, make_coco, truth_of

CATEGORIES = (3, 7, 90)


def random_boxes(draw: np.random.Generator, count: int) -> list[list[float]]:
    """Return boxes of all COCO sizes, on whole pixels half of the time so that IoUs tie."""
    corner, size = draw.uniform(0, 150, (count, 2)), 4 + 200 * draw.random((count, 2)) ** 3
    boxes = np.concatenate([corner, size], axis=1)
    return (np.ceil(boxes / 8) * 8 if draw.random() < 0.5 else boxes).tolist()  # type: ignore[no-any-return]


def random_ground_truth(draw: np.random.Generator, most_boxes: int = 8) -> COCO:
    """Return images with and without boxes, crowds, and annotation ids from 0."""
    images = [{"id": 5 + 3 * i} for i in range(int(draw.integers(1, 7)))]
    annotations = [
        {"image_id": image["id"], "category_id": int(draw.choice(CATEGORIES)), "bbox": box,
         "area": box[2] * box[3] * draw.choice([0.6, 1.0]), "iscrowd": int(draw.random() < 0.15)}
        for image in images
        for box in random_boxes(draw, int(draw.integers(0, most_boxes)))
    ]  # fmt: skip
    return make_coco(
        {
            "images": images,
            "categories": [{"id": c, "name": f"c{c}"} for c in CATEGORIES],
            "annotations": [{"id": i, **a} for i, a in enumerate(annotations)],
        }
    )


def random_detections(draw: np.random.Generator, coco: COCO, most_alarms: int) -> Detections:
    """Return moved truth, duplicates, wrong classes and false alarms; many scores are equal."""
    rows: list[tuple[int, int, list[float]]] = []
    for image in coco.imgs:
        for annotation in coco.imgToAnns[image]:
            for _ in range(int(draw.integers(0, 4))):
                wrong = draw.random() < 0.2
                category = int(draw.choice(CATEGORIES)) if wrong else annotation["category_id"]
                spread = draw.choice([0.0, 0.1, 0.3])
                moved = np.array(annotation["bbox"]) * draw.normal(1, spread, 4)
                rows.append((image, category, np.maximum(moved, 0.0).tolist()))
        for box in random_boxes(draw, int(draw.integers(0, most_alarms))):
            rows.append((image, int(draw.choice(CATEGORIES)), box))
    draw.shuffle(rows)
    steps = draw.choice([3, 20, 10**6])
    score = draw.integers(0, steps, len(rows)) / steps
    images, categories, boxes = zip(*rows, strict=True) if rows else ((), (), ())
    return detections_of(coco, images, categories, boxes, score)


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_the_last_digit_on_random_data(seed: int) -> None:
    draw = np.random.default_rng(seed)
    coco = random_ground_truth(draw)
    crowded = seed % 4 == 0  # more than COCO's 100 detections of an image and class
    ours, theirs = both(coco, random_detections(draw, coco, 500 if crowded else 12))
    assert ours == theirs
    assert seed or ours.stats["AP"] > 0


@pytest.mark.parametrize("at_once", [1, 30, 80])
def test_classes_can_be_matched_in_parts(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    draw = np.random.default_rng(5)
    coco = random_ground_truth(draw)
    found = random_detections(draw, coco, 60)
    counts = np.bincount(found.category, minlength=len(CATEGORIES))
    assert 2 * 30 < len(found) > 80 > counts.min()
    whole, theirs = both(coco, found)
    monkeypatch.setattr(matching, "_DETECTIONS_AT_ONCE", at_once)
    monkeypatch.setattr(matching, "_COMPARED_AT_ONCE", at_once)
    assert both(coco, found)[0] == whole == theirs


@pytest.mark.parametrize("spread", [1, 2**20, 2**60])
def test_sorting_by_two_numbers_of_any_size(spread: int) -> None:
    draw = np.random.default_rng(0)
    number, place = draw.integers(0, 7, 500) * spread, draw.permutation(900)[:500]
    expected = sorted(range(500), key=lambda i: (number[i], place[i]))
    assert matching._sorted_by(number, place).tolist() == expected


@pytest.mark.parametrize("max_dets", [0, 150])
def test_equal_beyond_100_boxes_of_a_class(max_dets: int) -> None:
    draw = np.random.default_rng(3)
    boxes = [[12.0 * (i % 20), 12.0 * (i // 20), 10.0, 10.0] for i in range(130)]
    coco = make_coco(
        {
            "images": [{"id": 1}],
            "categories": [{"id": 3, "name": "cell"}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": 3, "bbox": b} for i, b in enumerate(boxes)
            ],
        }
    )
    found = detections_of(coco, [1] * 130, [3] * 130, boxes, draw.random(130))
    ours, theirs = both(coco, found, max_dets)
    assert ours == theirs
    assert ours.stats["AR_100"] == pytest.approx(100 / 130)
    assert ours.beyond_100 is not None
    assert ours.beyond_100["max_dets"] == (max_dets or 130)
    assert ours.beyond_100["AP"] == ours.beyond_100["AR"] == pytest.approx(1.0)
    assert f"with {max_dets or 130}: AP 1.000" in ours.table()


@pytest.mark.parametrize(("max_dets", "counting"), [(0, 160), (130, 130)])
def test_without_classes_as_many_count_as_an_image_has_boxes(max_dets: int, counting: int) -> None:
    """More than it has of any class, and none has the text of an id that was a class's."""
    boxes = [[12.0 * (i % 20), 12.0 * (i // 20), 10.0, 10.0] for i in range(160)]
    ids = [1] * 120 + [2] * 40
    coco = make_coco(
        {
            "images": [{"id": 1}],
            "categories": [{"id": 1}, {"id": 2}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": c, "bbox": b}
                for i, (c, b) in enumerate(zip(ids, boxes, strict=True))
            ],
        }
    )
    truth = replace(truth_of(coco), category_texts={1: "a", 2: "b"})
    evaluator = Evaluator(truth, max_dets=max_dets)
    evaluator.add(detections_of(coco, [1] * 160, ids, boxes, np.linspace(0.9, 0.1, 160)))
    merged = evaluator.without_classes().evaluate()
    assert merged.beyond_100 is not None
    assert merged.beyond_100["max_dets"] == counting
    assert merged.beyond_100["AR"] == pytest.approx(counting / 160)
    assert [row.category_id for row in merged.per_class] == [1]
    assert [row.category_id for row in evaluator.evaluate().per_class] == ["a", "b"]


@pytest.mark.parametrize("boxes", [True, False])
def test_equal_without_detections_or_without_ground_truth(boxes: bool) -> None:
    draw = np.random.default_rng(1)
    coco = random_ground_truth(draw)
    found = random_detections(draw, coco, 9)
    if boxes:
        found = found.select(np.zeros(0, dtype=np.int64))
    else:
        coco = make_coco({**coco.dataset, "annotations": []})
    ours, theirs = both(coco, found)
    assert ours == theirs
    assert ours.stats["AP"] == (0.0 if boxes else -1.0)


@pytest.mark.long
@pytest.mark.parametrize(
    "file",
    [
        "coco_by/annotations/instances_val2017.json",
        "coco_by/annotations/instances_train2017.json",
        "bccd/annotations/instances_test.json",
        "bccd/annotations/instances_val.json",
    ],
)
def test_equal_on_real_data(file: str, shared: Callable[[str], Path]) -> None:
    coco = make_coco(json.loads(shared(f"datasets/{file}").read_text()))
    draw = np.random.default_rng(0)
    truth = list(coco.anns.values())
    box = np.array([a["bbox"] for a in truth]).repeat(3, axis=0)
    found = detections_of(
        coco,
        np.array([a["image_id"] for a in truth]).repeat(3).tolist(),
        np.array([a["category_id"] for a in truth]).repeat(3).tolist(),
        np.maximum(box * draw.normal(1, 0.08, box.shape), 0.0),
        draw.random(len(box)).round(3),
    )
    ours, theirs = both(coco, found)
    assert ours == theirs
    assert 0 < ours.stats["AP"] < 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "file", "minimum"),
    [
        ("bccd_val", "bccd/annotations/instances_val.json", 0.4),
        ("coco_by_val", "coco_by/annotations/instances_val2017.json", 0.2),
    ],
)
def test_equal_on_what_trained_models_found_in_real_images(
    name: str, file: str, minimum: float, shared: Callable[[str], Path]
) -> None:
    """The detections, of scores from 0.05 on, are of models that were trained for minutes."""
    coco = make_coco(json.loads(shared(f"datasets/{file}").read_text()))
    with np.load(Path(__file__).with_name("real_detections.npz")) as saved:
        found = detections_of(
            coco,
            saved[f"{name}_image"].tolist(),
            saved[f"{name}_category"].tolist(),
            saved[f"{name}_box"],
            saved[f"{name}_score"],
        )
    ours, theirs = both(coco, found)
    assert ours == theirs
    assert ours.stats["AP"] > minimum


@pytest.mark.long
@pytest.mark.parametrize("any_category", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_crowded_image_has_the_same_overlaps(
    monkeypatch: pytest.MonkeyPatch, seed: int, any_category: bool
) -> None:
    """Far annotations are never compared; what is left, and its order, is the same."""
    draw = np.random.default_rng(seed)
    coco = random_ground_truth(draw, most_boxes=120)
    truth, found = truth_of(coco), random_detections(draw, coco, most_alarms=40)
    for min_iou in (0.1, 0.5, 1.0):
        monkeypatch.setattr(matching, "_CROWDED", 10**9)
        expected = overlaps(truth, found, min_iou, any_category=any_category)
        for crowded in (0, 5):
            monkeypatch.setattr(matching, "_CROWDED", crowded)
            monkeypatch.setattr(matching, "_PAIRS_PER_CHUNK", 100)
            result = overlaps(truth, found, min_iou, any_category=any_category)
            assert all(np.array_equal(a, b) for a, b in zip(result, expected, strict=True))
