"""COCO metrics against plain pycocotools, and what pycocotools gets wrong or crashes on."""

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from datasets.checks.entries import check_content
from datasets.formats.registry import Source
from datasets.index import CocoIndex
from engine.evaluation.evaluator import STAT_NAMES, Evaluator, save_results
from engine.evaluation.matching import Truth
from tests.unit.engine.evaluation.shared import make_coco, truth_of

CATEGORIES = (3, 7, 90)
LABELS = {0: 3, 1: 7, 2: 90, 5: 4}  # label 5 names a category that the data lacks


def random_ground_truth(generator: torch.Generator, num_images: int, first_id: int) -> COCO:
    """Return images with gaps in their ids, some without boxes, boxes of all sizes, crowds."""
    annotations: list[dict[str, Any]] = []
    for image in range(num_images):
        for _ in range(int(torch.randint(0, 6, (), generator=generator))):
            x, y = (torch.rand(2, generator=generator) * 100).tolist()
            w, h = (2 + 200 * torch.rand(2, generator=generator) ** 2).tolist()
            annotations.append(
                {
                    "id": first_id + 3 * len(annotations),
                    "image_id": 10 + 7 * image,
                    "category_id": CATEGORIES[len(annotations) % 3],
                    "bbox": [x, y, w, h],
                    "area": w * h * 0.7,
                    "iscrowd": int(torch.rand((), generator=generator) < 0.15),
                }
            )
    return make_coco(
        {
            "info": {},
            "images": [{"id": 10 + 7 * i} for i in range(num_images)],
            "categories": [{"id": c, "name": f"c{c}"} for c in CATEGORIES],
            "annotations": annotations,
        }
    )


def random_detections(generator: torch.Generator, coco: COCO, image_id: int) -> dict[str, Tensor]:
    """Return shifted ground truth and false alarms, with ties among the scores."""
    truth = [a["bbox"] for a in coco.imgToAnns[image_id]]
    xywh = torch.tensor(truth, dtype=torch.float32).reshape(-1, 4)
    xywh = xywh * (1 + 0.15 * torch.randn(xywh.shape, generator=generator))
    alarms = int(torch.randint(0, 4, (), generator=generator))
    noise = 1 + 150 * torch.rand(alarms, 4, generator=generator)
    xywh = torch.cat([xywh, noise]).clamp(min=0.5)
    labels = [{3: 0, 7: 1, 90: 2}[a["category_id"]] for a in coco.imgToAnns[image_id]]
    extra = torch.tensor([0, 1, 2, 5])[torch.randint(0, 4, (len(noise),), generator=generator)]
    return {
        "scores": (torch.rand(len(xywh), generator=generator) * 8).round() / 8.1,
        "labels": torch.cat([torch.tensor(labels, dtype=torch.int64), extra]),
        "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
    }


def plain_pycocotools(coco_gt: COCO, results: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco_gt, coco_gt.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(map(float, evaluation.stats))


def perfect(coco: COCO, image_id: int) -> dict[str, Tensor]:
    annotations = coco.imgToAnns[image_id]
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [CATEGORIES.index(a["category_id"]) for a in annotations]
    return {"scores": torch.ones(len(labels)), "labels": torch.tensor(labels), "boxes": boxes}


def checked(content: dict[str, Any]) -> Truth:
    """Return the arrays that the product makes of a file's content."""
    place = Path("instances.json")
    entries = check_content(Source(content, Path(), place), need_boxes=False)
    whole = CocoIndex.from_content(entries, place, None, need_boxes=False)
    return Truth.of(whole)


def truth_in(file: Path) -> Truth:
    return checked(json.loads(file.read_text()))


def results_of(evaluator: Evaluator) -> list[dict[str, Any]]:
    return evaluator.detections().to_coco(evaluator.truth)


def empty_detection() -> dict[str, Tensor]:
    return {
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
        "boxes": torch.zeros(0, 4),
    }


@pytest.mark.long
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), num_images=st.integers(1, 5), added=st.integers(0, 5))
def test_equals_pycocotools_on_the_written_file(seed: int, num_images: int, added: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coco = random_ground_truth(generator, num_images, first_id=1)
    evaluator = Evaluator(truth_of(coco), LABELS)
    for image_id in sorted(coco.imgs)[:added]:
        evaluator.update([image_id], [random_detections(generator, coco, image_id)])
    result = evaluator.evaluate()
    with TemporaryDirectory() as folder:
        save_results(Path(folder), result, evaluator)
        written = Path(folder) / "eval" / "detections.json"
        detections = json.loads(written.read_text())
        stored = json.loads((Path(folder) / "eval" / "results.json").read_text())
        if detections:  # loadRes cannot read an empty list
            assert list(result.stats.values()) == plain_pycocotools(coco, str(written))
    assert detections == results_of(evaluator)
    assert stored["stats"] == {k: None if v == -1 else v for k, v in result.stats.items()}
    for row, c in zip(stored["per_class"], result.per_class, strict=True):
        assert (row["AP"] is None) == (c.num_boxes == 0)
    assert tuple(stored["stats"]) == STAT_NAMES


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), num_images=st.integers(1, 5))
def test_class_ap_averages_to_the_whole(seed: int, num_images: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coco = random_ground_truth(generator, num_images, first_id=1)
    evaluator = Evaluator(truth_of(coco), LABELS)
    for image_id in coco.imgs:
        evaluator.update([image_id], [random_detections(generator, coco, image_id)])
    result = evaluator.evaluate()
    measured = [c for c in result.per_class if c.AP >= 0]
    if measured:
        assert result.stats["AP"] == pytest.approx(sum(c.AP for c in measured) / len(measured))
        assert result.stats["AP50"] == pytest.approx(sum(c.AP50 for c in measured) / len(measured))
    else:
        assert result.stats["AP"] == -1
    annotations = coco.dataset["annotations"]
    for c in result.per_class:
        of_class = [a for a in annotations if a["category_id"] == c.category_id]
        assert c.num_boxes == sum(not a["iscrowd"] for a in of_class)
        assert (c.AP == -1) == (c.num_boxes == 0)


def test_real_data_equals_pycocotools(shared: Callable[[str], Path], tmp_path: Path) -> None:
    file = shared("datasets/coco_by/annotations/instances_val2017.json")
    coco = make_coco(json.loads(file.read_text()))
    evaluator = Evaluator(truth_in(file), {i: i for i in range(91)})
    generator = torch.Generator().manual_seed(0)
    for image_id, annotations in coco.imgToAnns.items():
        xywh = torch.tensor([a["bbox"] for a in annotations])
        xywh = xywh * (1 + 0.05 * torch.randn(xywh.shape, generator=generator))
        detection = {
            "scores": torch.rand(len(xywh), generator=generator),
            "labels": torch.tensor([a["category_id"] for a in annotations]),
            "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
        }
        evaluator.update([image_id], [detection])
    result = evaluator.evaluate()
    save_results(tmp_path, result, evaluator)
    expected = plain_pycocotools(coco, str(tmp_path / "eval" / "detections.json"))
    assert list(result.stats.values()) == expected
    assert 0 < result.stats["AP"] < 1
    assert "toothbrush" in result.table()


@pytest.mark.parametrize("first_id", [0, 1, 900_000_000_000])
def test_ground_truth_as_prediction_is_perfect(first_id: int) -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 6, first_id)
    evaluator = Evaluator(truth_of(coco), LABELS)
    evaluator.update(list(coco.imgs), [perfect(coco, i) for i in coco.imgs])
    assert evaluator.evaluate().stats["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("added", [False, True])
def test_no_detections_is_zero(added: bool) -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 6, 1)
    evaluator = Evaluator(truth_of(coco), LABELS)
    if added:
        evaluator.update(list(coco.imgs), [empty_detection() for _ in coco.imgs])
    result = evaluator.evaluate()
    assert results_of(evaluator) == []
    assert result.stats["AP"] == result.stats["AR_100"] == 0
    assert {c.AP for c in result.per_class if c.num_boxes} == {0.0}


def test_an_image_never_added_counts_as_missed() -> None:
    boxes = [{"id": i, "image_id": i, "category_id": 3, "bbox": [5, 5, 40, 40]} for i in (1, 2)]
    coco = make_coco(
        {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (2, 1)],
            "categories": [{"id": 3}],
            "annotations": boxes,
        }
    )  # no area, no iscrowd, no category name
    evaluator = Evaluator(checked(coco.dataset), {0: 3})
    evaluator.update([1], [perfect(coco, 1)])
    result = evaluator.evaluate()
    assert result.stats["AR_100"] == pytest.approx(0.5)
    assert result.per_class[0].name == "3"
    assert "area" not in coco.dataset["annotations"][0], "the given ground truth stays as it is"


def test_adding_an_image_again_replaces_its_detections() -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 3, 1)
    evaluator = Evaluator(truth_of(coco), LABELS)
    for _ in range(2):
        evaluator.update(list(coco.imgs), [perfect(coco, i) for i in coco.imgs])
    assert len(evaluator.detections()) == len(coco.anns)
    assert evaluator.evaluate().num_detections == len(coco.anns)


def test_what_is_added_counts_instead_of_what_was_there_before() -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 3, 1)
    first, second, third = sorted(coco.imgs)
    evaluator = Evaluator(truth_of(coco), LABELS)
    evaluator.update([third, first], [perfect(coco, i) for i in (third, first)])
    evaluator.update([first], [empty_detection()])
    other = Evaluator(truth_of(coco), LABELS)
    other.update([third, second], [perfect(coco, i) for i in (second, third)])
    evaluator.add(other.detections())
    expected = {second: coco.imgToAnns[third], third: coco.imgToAnns[second]}
    for _ in range(2):
        found = results_of(evaluator)
        assert [d["image_id"] for d in found] == [i for i in expected for _ in expected[i]]
        assert [d["bbox"] for d in found] == [a["bbox"] for i in expected for a in expected[i]]
    evaluator.update([second], [empty_detection()])
    assert {d["image_id"] for d in results_of(evaluator)} == {third}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_of_every_type_are_kept_exactly(dtype: torch.dtype) -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 1, 1)
    boxes = (100 * torch.rand(9, 4, dtype=torch.float64)).to(dtype)
    scores = torch.rand(9, dtype=torch.float64).to(dtype)
    evaluator = Evaluator(truth_of(coco), LABELS)
    labels = torch.zeros(9, dtype=torch.int64)
    evaluator.update([10], [{"scores": scores, "labels": labels, "boxes": boxes}])
    rows = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes.double().tolist()]
    assert evaluator.detections().box.tolist() == rows
    assert evaluator.detections().score.tolist() == scores.double().tolist()


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_the_written_file_is_one_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("engine.evaluation.evaluator._WRITTEN_AT_ONCE", at_once)
    coco = random_ground_truth(torch.Generator().manual_seed(3), 3, 1)
    evaluator = Evaluator(truth_of(coco), LABELS)
    evaluator.update(list(coco.imgs), [perfect(coco, i) for i in coco.imgs])
    save_results(tmp_path, evaluator.evaluate(), evaluator)
    text = (tmp_path / "eval" / "detections.json").read_text()
    assert text == json.dumps(results_of(evaluator)) + "\n"
    assert len(coco.anns) > 4


def test_detections_keep_every_bit_and_drop_unknown_labels() -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 1, 1)
    evaluator = Evaluator(truth_of(coco), LABELS)
    boxes = torch.tensor([[0.1, 0.2, 10.3, 20.7], [1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]])
    scores = torch.tensor([0.3, 0.2, 0.1])
    evaluator.update([10], [{"scores": scores, "labels": torch.tensor([2, 5, 17]), "boxes": boxes}])
    x0, y0, x1, y1 = (float(v) for v in boxes[0])
    expected = {"image_id": 10, "category_id": 90, "bbox": [x0, y0, x1 - x0, y1 - y0]}
    assert results_of(evaluator) == [{**expected, "score": float(scores[0])}]


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), num_images=st.integers(1, 7), processes=st.integers(1, 4))
def test_merged_evaluators_equal_one(seed: int, num_images: int, processes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coco = random_ground_truth(generator, num_images, first_id=1)
    alone = Evaluator(truth_of(coco), LABELS)
    parts = [Evaluator(truth_of(coco), LABELS) for _ in range(processes)]
    for number, image_id in enumerate(sorted(coco.imgs)):
        detections = random_detections(generator, coco, image_id)
        if number == 1:
            detections = empty_detection()  # seen, and nothing found
        for evaluator in (alone, parts[number % processes]):
            evaluator.update([image_id], [detections])
    for part in parts[1:]:
        parts[0].add(pickle.loads(pickle.dumps(part.detections())))
    assert results_of(parts[0]) == results_of(alone)
    assert parts[0].evaluate() == alone.evaluate()


def test_table_says_why_a_number_is_missing() -> None:
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 200, 200]}
    content = {
        "images": [{"id": 1}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [box],
    }
    coco = make_coco(content)
    evaluator = Evaluator(truth_of(coco), {0: 3})
    evaluator.update([1], [perfect(coco, 1)])
    table = evaluator.evaluate().table()
    assert "n/a: no small or medium ground truth" in table
    assert "-1" not in table
    assert [line.split() for line in table.splitlines()[-2:]] == [
        ["cat", "1", "1.000", "1.000"],
        ["dog", "0", "n/a", "n/a"],
    ]
    nothing = Evaluator(truth_of(make_coco({**content, "annotations": []})), {0: 3}).evaluate()
    assert nothing.stats["AP"] == -1
    assert "n/a: no ground truth" in nothing.table()


@pytest.mark.parametrize(("count", "rows"), [(20, 20), (41, 21), (300, 0)])
def test_table_stays_short_and_aligned(count: int, rows: int) -> None:
    categories = [{"id": i, "name": f"class number {i} " + "x" * (i % 40)} for i in range(count)]
    coco = make_coco({"images": [{"id": 1}], "categories": categories, "annotations": []})
    lines = Evaluator(truth_of(coco), {}).evaluate().table().splitlines()
    table = [line for line in lines if line.startswith("class number")]
    assert len(table) == rows
    assert max(map(len, lines)) <= 110
    assert len({line.index("n/a") for line in table}) <= 1


@pytest.mark.parametrize("key", ["scores", "boxes"])
def test_numbers_that_are_not_finite_are_refused(key: str) -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 1, 1)
    detection = {
        "scores": torch.ones(1),
        "labels": torch.zeros(1, dtype=torch.int64),
        "boxes": torch.ones(1, 4),
    }
    detection[key] = detection[key] * float("nan")
    with pytest.raises(ValueError, match="image id 10: .* not finite"):
        Evaluator(truth_of(coco), LABELS).update([10], [detection])


def test_unknown_image_is_refused() -> None:
    coco = random_ground_truth(torch.Generator().manual_seed(3), 1, 1)
    with pytest.raises(ValueError, match="image id 11"):
        Evaluator(truth_of(coco), LABELS).update([11], [empty_detection()])
