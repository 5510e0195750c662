"""Error kinds, confusion, thresholds, images and the page, on cases whose answers are known."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from engine.evaluation.analysis import Analysis, analyse, report, save_analysis
from engine.evaluation.outcomes import KINDS, best_threshold
from tests.unit.engine.evaluation.shared import detections_of, evaluator_with, make_coco
from tests.unit.engine.evaluation.test_matching import random_detections, random_ground_truth

Row = tuple[int, int, list[float], float]  # image, category, (x, y, w, h), score

BOX_A, BOX_B = [0.0, 0.0, 100.0, 100.0], [300.0, 300.0, 100.0, 100.0]


def scene(num_images: int = 1) -> COCO:
    """Return images with a cat at `BOX_A` and a dog at `BOX_B` each."""
    annotations = [
        {"image_id": i + 1, "category_id": c, "bbox": b, "area": 1e4, "iscrowd": 0}
        for i in range(num_images)
        for c, b in ((3, BOX_A), (7, BOX_B))
    ]
    return make_coco(
        {
            "images": [{"id": i + 1, "file_name": f"{i + 1}.jpg"} for i in range(num_images)],
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "<dog>"}],
            "annotations": [{"id": i, **a} for i, a in enumerate(annotations)],
        }
    )


def analysed(coco: COCO, rows: list[Row]) -> Analysis:
    images, categories, boxes, scores = zip(*rows, strict=True) if rows else ((), (), (), ())
    evaluator = evaluator_with(coco, detections_of(coco, images, categories, boxes, scores))
    return analyse(evaluator, evaluator.evaluate())


def moved(box: list[float], by: float) -> list[float]:
    return [box[0] + by, *box[1:]]


@pytest.mark.parametrize(
    ("wrong", "kind", "missed"),
    [
        ((1, 7, BOX_A, 0.8), "class", 0),
        ((1, 3, moved(BOX_A, 60), 0.8), "location", 0),  # IoU 0.25
        ((1, 7, moved(BOX_A, 60), 0.8), "both", 1),
        ((1, 7, moved(BOX_B, 5), 0.8), "duplicate", 1),
        ((1, 3, [200.0, 0.0, 50.0, 50.0], 0.8), "background", 1),
    ],
)
def test_each_kind_of_error(wrong: Row, kind: str, missed: int) -> None:
    """The dog is found; of the cat there is nothing but what is wrong."""
    found = analysed(scene(), [(1, 7, BOX_B, 0.9), wrong])
    counts = {k: e.count for k, e in found.errors.items()}
    assert counts == {k: int(k == kind) for k in KINDS} | {"missed": missed}
    # a cat set right is a class won: AP50 goes from 0.5 to 1
    gain = 0.5 if kind in ("class", "location") else 0.0
    assert found.errors[kind].delta_AP50 == pytest.approx(gain)


def test_removing_false_alarms_and_missed_objects_gains_their_cost() -> None:
    alarm = [200.0, 0.0, 50.0, 50.0]
    found = analysed(scene(2), [(1, 3, alarm, 0.9), (1, 3, BOX_A, 0.8), (1, 7, BOX_B, 0.7)])
    # cat: of two, one found behind a false alarm; 51 of 101 recalls are reached
    assert found.result.stats["AP50"] == pytest.approx((51 * 0.5 + 51) / 101 / 2)
    assert found.errors["background"].delta_AP50 == pytest.approx(51 * 0.5 / 101 / 2)
    whole_recall = (0.5 + 1) / 2
    assert found.errors["missed"].count == 2
    assert found.errors["missed"].delta_AP50 == pytest.approx(
        whole_recall - found.result.stats["AP50"]
    )


def test_confusion_matrix_counts_every_object_and_every_detection_once() -> None:
    rows: list[Row] = [(1, 7, BOX_A, 0.9), (2, 3, BOX_A, 0.9), (2, 3, moved(BOX_A, 300), 0.9),
                       (1, 7, BOX_B, 0.9), (3, 7, BOX_B, 0.05)]  # fmt: skip
    found = analysed(scene(3), rows)
    cat, nothing = 0, 2
    matrix = np.array(found.confusion)
    assert matrix[cat].tolist() == [1, 1, 1]
    assert matrix[nothing, cat] == 1
    assert matrix[:2].sum() == 6
    assert found.most_confused(5) == [("cat", "<dog>", 1)]


@settings(max_examples=60)
@given(
    scores=st.lists(st.integers(0, 6), max_size=12),
    hits=st.lists(st.booleans(), min_size=12, max_size=12),
    more=st.integers(0, 4),
)
def test_best_threshold_is_the_best_of_all(scores: list[int], hits: list[bool], more: int) -> None:
    score, hit = np.array(scores, dtype=np.float64), np.array(hits[: len(scores)], dtype=np.bool_)
    positives = int(hit.sum()) + more

    def f1(minimum: float) -> float:
        kept = score >= minimum
        return float(2 * (hit & kept).sum() / max(1, int(kept.sum()) + positives))

    best = best_threshold(score, hit, positives)
    if not hit.any():
        assert best is None
        return
    assert best is not None
    assert best.f1 == pytest.approx(f1(best.score)) == pytest.approx(max(map(f1, scores)))
    kept = score >= best.score
    assert best.precision == pytest.approx(hit[kept].mean())
    assert best.recall == pytest.approx((hit & kept).sum() / positives)


def test_worst_images_come_first_with_what_they_lost() -> None:
    rows: list[Row] = [(1, 3, BOX_A, 0.75), (1, 7, BOX_B, 0.5), (2, 3, BOX_A, 0.75)]
    found = analysed(scene(2), rows)
    assert [(w.image_id, w.file_name, w.lost, w.missed) for w in found.worst] == [
        (2, "2.jpg", 1.25, 1),
        (1, "1.jpg", 0.75, 0),
    ]


def test_ap_by_number_of_objects_separates_the_images() -> None:
    coco = scene(2)
    coco = make_coco({**coco.dataset, "annotations": coco.dataset["annotations"][:3]})
    found = analysed(coco, [(1, 3, BOX_A, 0.9), (1, 7, BOX_B, 0.8)])
    assert [(b.objects, b.images, b.AP) for b in found.by_objects] == [
        ("1", 1, 0.0),
        ("2-3", 1, pytest.approx(1.0)),
    ]


def test_without_detections_every_object_is_missed() -> None:
    found = analysed(scene(2), [])
    costs = {kind: e.delta_AP50 for kind, e in found.errors.items()}
    assert costs == {**dict.fromkeys(KINDS, 0.0), "missed": 1.0}
    assert found.errors["missed"].count == 4


def test_without_objects_nothing_can_be_measured() -> None:
    coco = make_coco({**scene().dataset, "annotations": []})
    evaluator = evaluator_with(coco, detections_of(coco, [1], [3], BOX_A, [0.9]), max_dets=300)
    found = analyse(evaluator, evaluator.evaluate())
    assert {e.delta_AP50 for e in found.errors.values()} == {None}
    assert found.errors["background"].count == 1
    assert found.summary().count("n/a") == len(KINDS)
    assert found.min_scores.tolist() == [0.5, 0.5]
    page = report(found, {}, title="t")
    assert "with 300: AP n/a, AP50 n/a" in page
    assert page.count("No objects to find: n/a.") == 2
    assert not re.search(r"-1\b|nan|None", re.sub("<style>.*?</style>", "", page, flags=re.S))


def test_boxes_are_drawn_from_the_threshold_of_their_class_on() -> None:
    rows: list[Row] = [(1, 3, BOX_A, 0.9), (1, 7, BOX_A, 0.8), (2, 3, BOX_A, 0.4)]
    coco = make_coco({**scene(2).dataset, "annotations": scene(2).dataset["annotations"][::2]})
    assert analysed(coco, rows).min_scores.tolist() == [0.4, 0.4]  # no dog is ever right
    assert analysed(scene(2), [*rows, (1, 7, BOX_B, 0.3)]).min_scores.tolist() == [0.4, 0.3]


class Checker(HTMLParser):
    """Collect open elements, and what would be fetched or cannot be read aloud."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.attributes: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at what an element refers to and is called."""
        values = dict(attrs)
        self.attributes.append([name for name, _ in attrs])
        source = values.get("src") or values.get("href") or values.get("xlink:href") or "data:"
        if not source.startswith(("data:", "#")) or tag in ("script", "link"):
            self.faults.append(f"{tag} {source[:40]}")
        if (tag == "img" and not values.get("alt")) or (tag == "th" and "scope" not in values):
            self.faults.append(f"{tag} without text for readers")
        if tag == "svg" and not (values.get("role") == "img" and values.get("aria-label")):
            self.faults.append("svg without a label")
        if tag not in ("meta", "img", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Look whether it closes what was open."""
        if self.open and self.open[-1] == tag:
            self.open.pop()
        elif tag not in ("line", "polyline"):
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")


@pytest.mark.parametrize("seed", range(8))
def test_the_page_is_whole_on_random_data(seed: int) -> None:
    draw = np.random.default_rng(seed)
    coco = random_ground_truth(draw, most_boxes=(1, 8)[seed % 2])
    evaluator = evaluator_with(coco, random_detections(draw, coco, 6) if seed % 4 else None)
    found = analyse(evaluator, evaluator.evaluate())
    image = {i: Image.new("RGB", (40, 30)) for i in coco.imgs}
    page = report(found, image, title="a & <b>")
    checker = Checker()
    checker.feed(page)
    assert checker.faults == []
    assert checker.open == []
    assert "a &amp; &lt;b&gt;" in page
    assert not re.search(r"nan|>-1|None", page)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.summary()


def test_hostile_names_are_text() -> None:
    """Class names, file names and titles come from whoever made the data."""
    hostile = """</style><script>alert("1")</script>'><img src=x onerror=alert(2)>"""
    coco = scene(2)
    coco.imgs[1]["file_name"] = coco.imgs[2]["file_name"] = hostile
    coco.cats[3]["name"] = hostile
    for more in (0, 40):  # a matrix, or a list of the most frequent confusions
        extra = [{"id": 100 + i, "name": f"{hostile}{i}"} for i in range(more)]
        content = {**coco.dataset, "categories": [*coco.cats.values(), *extra]}
        found = analysed(make_coco(content), [(1, 7, BOX_A, 0.9), (1, 3, BOX_A, 0.8)])
        page = report(found, {1: Image.new("RGB", (40, 30))}, title=hostile)
        checker = Checker()
        checker.feed(page)
        assert checker.faults == []
        assert "onerror" not in {name for names in checker.attributes for name in names}
        assert page.count("&lt;script&gt;") > 8
        assert "<script" not in page


def test_files_hold_thresholds_by_name_and_null_where_nothing_is_measured(tmp_path: Path) -> None:
    found = analysed(scene(), [(1, 3, BOX_A, 0.75)])
    save_analysis(tmp_path, found, {}, title="t")
    stored = json.loads((tmp_path / "eval" / "analysis.json").read_text())
    assert stored["best_thresholds"] == {"cat": 0.75}
    assert stored["stats"]["AP_small"] is None
    assert "<dog>" not in (tmp_path / "eval" / "report.html").read_text()
