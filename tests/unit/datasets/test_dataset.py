"""The COCO reader: labels, targets, image modes, and ground truth that scores 1.0."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

from datasets.dataset import CocoDetection
from datasets.index import CocoIndex
from datasets.transforms import EvalTransform, TrainTransform
from engine.evaluation.evaluator import Evaluator
from engine.evaluation.matching import Detections, Truth
from util.batch import UnreadableImage
from util.classes import Classes
from util.errors import DataError

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PLAIN = EvalTransform(eval_scale=60, max_size=100, mean=MEAN, std=STD)

Content = dict[str, Any]
Write = Callable[[Content], tuple[Path, Path]]


def average_precision(index: CocoIndex) -> float:
    """Score the ground truth itself as detections."""
    truth = Truth.of(index)
    evaluator = Evaluator(truth, backend="pycocotools")
    seen = truth.select(~truth.crowd)
    score = np.full(len(seen.image), 0.9)
    evaluator.add(Detections(seen.image, seen.category, seen.box, score))
    return evaluator.evaluate().stats["AP"]


def test_a_machine_without_the_images_is_refused(content: Content, write: Write) -> None:
    path, folder = write(content)
    index = CocoIndex.load(path, folder, need_boxes=True)
    (folder / "5.png").unlink()
    index.require_images()  # single missing images are reported elsewhere
    for image in folder.iterdir():
        image.unlink()
    with pytest.raises(DataError, match=f"{folder}: none of the images is there on "):
        index.require_images()


def test_labels_follow_category_ids_and_boxes_their_images(content: Content, write: Write) -> None:
    dataset = CocoDetection(CocoIndex.load(*write(content), need_boxes=True), PLAIN)
    assert dataset.classes == Classes((3, 7), ("dog", "cat"))
    expected: dict[int, tuple[int, list[float]]] = {
        5: (1, [4, 6, 14, 18]),
        9: (0, [0, 0, 40, 30]),
        2: (1, [1.5, 2.5, 4.5, 6.5]),
    }
    assert len(dataset) == 3
    for item in (dataset[i] for i in range(3)):
        assert not isinstance(item, UnreadableImage)
        image, target = item
        label, box = expected.pop(int(target["image_id"]))
        assert image.shape == (3, 60, 80)
        assert target["labels"].tolist() == [label]
        assert target["labels"].dtype == torch.int64
        pixels = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([40.0, 30, 40, 30])
        np.testing.assert_allclose(pixels[0].numpy(), box, atol=1e-4)
        assert target["orig_size"].tolist() == [30, 40]
        assert target["size"].tolist() == [60, 80]


def test_labels_are_mapped_into_another_label_space(content: Content, write: Write) -> None:
    space = Classes((1, 2, 3), ("bird", "cat", "dog"))
    index = CocoIndex.load(*write(content), need_boxes=True)
    dataset = CocoDetection(index, PLAIN, classes=space)
    items = [dataset[i] for i in range(3)]
    assert [item[1]["labels"].tolist() for item in items if isinstance(item, tuple)] == [
        [1], [2], [1],
    ]  # fmt: skip


def test_a_class_without_annotations_need_not_be_known(content: Content, write: Write) -> None:
    index = CocoIndex.load(*write(content), need_boxes=True)
    known, annotations = index.classes, content["annotations"]
    content["categories"].append({"id": 1, "name": "alien"})
    more = CocoIndex.load(*write(content), need_boxes=True)
    assert len(more.classes) == len(known) + 1
    dataset, expected = (CocoDetection(i, PLAIN, classes=known) for i in (more, index))
    assert dataset.label_to_category == expected.label_to_category
    for (_, target), (_, wanted) in zip(dataset, expected, strict=True):  # type: ignore[call-overload]
        assert target["labels"].equal(wanted["labels"])
    content["annotations"] = []  # as a test set's; all that is known can still be found
    bare = CocoDetection(CocoIndex.load(*write(content), need_boxes=False), PLAIN, classes=known)
    assert bare.label_to_category == expected.label_to_category
    assert bare.unknown_classes == ["alien"]
    content["annotations"] = annotations
    content["annotations"][0]["category_id"] = 1
    index = CocoIndex.load(*write(content), need_boxes=True)
    with pytest.raises(DataError, match="'alien'"):
        CocoDetection(index, PLAIN, classes=known)
    content.update(annotations=[], categories=[{"id": 3, "name": "alien"}])
    index = CocoIndex.load(*write(content), need_boxes=False)
    with pytest.raises(DataError, match="'alien'"):
        CocoDetection(index, PLAIN, classes=known)


def test_ground_truth_as_detections_scores_one(content: Content, write: Write) -> None:
    """Annotation id 0 is in the set, which pycocotools by itself takes for no match."""
    assert average_precision(CocoIndex.load(*write(content), need_boxes=True)) == 1.0


@pytest.mark.parametrize(
    ("annotations", "images", "num_crowd"),
    [
        ("coco_by/annotations/instances_val2017.json", "coco_by/val2017", 6),
        ("bccd/annotations/instances_test.json", "bccd/BCCD/JPEGImages", 0),
    ],
)
def test_real_sets_read_whole(
    shared: Callable[[str], Path], annotations: str, images: str, num_crowd: int
) -> None:
    json_path = shared(f"datasets/{annotations}")
    index = CocoIndex.load(json_path, shared(f"datasets/{images}"), need_boxes=True)
    raw = json.loads(json_path.read_text())
    used = [a for a in raw["annotations"] if not a["iscrowd"]]
    assert len(index.boxes) == len(used)
    assert len(raw["annotations"]) - len(used) == num_crowd
    assert f"{num_crowd} crowd boxes" in index.summary()
    names = {category["id"]: category["name"] for category in raw["categories"]}
    for i in range(0, len(index), 7):
        part = slice(index.first[i], index.first[i + 1])
        mine = [a for a in used if a["image_id"] == index.images.ids[i]]
        assert [index.classes.names[k] for k in index.labels[part]] == [
            names[a["category_id"]] for a in mine
        ]
        xywh = np.array([a["bbox"] for a in mine]).reshape(-1, 4)
        np.testing.assert_allclose(index.boxes[part][:, :2], xywh[:, :2], atol=1e-3)
    dataset = CocoDetection(index, PLAIN)
    assert not any(isinstance(dataset[i], UnreadableImage) for i in range(0, len(dataset), 9))
    assert average_precision(index) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(content: Content, write: Write, mode: str) -> None:
    json_path, folder = write(content)
    suffix = "tif" if mode == "CMYK" else "png"
    name = f"grey.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.full((30, 40), 51400, dtype=np.uint16)).save(folder / name)
    else:
        level = 255 if mode == "1" else 200
        image = Image.new("RGB", (40, 30), (level,) * 3)
        (image.quantize(4) if mode == "P" else image.convert(mode)).save(folder / name)
    content["images"][0]["file_name"] = name
    json_path.write_text(json.dumps(content))
    item = CocoDetection(CocoIndex.load(json_path, folder, need_boxes=True), PLAIN)[0]
    assert not isinstance(item, UnreadableImage)
    expected = 1.0 if mode == "1" else 200 / 255
    torch.testing.assert_close(item[0], torch.full((3, 60, 80), expected))


def test_damaged_images_are_reported_not_raised(content: Content, write: Write) -> None:
    json_path, folder = write(content)
    whole = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(whole[: len(whole) // 2])
    (folder / "9.png").write_text("no image")
    dataset = CocoDetection(CocoIndex.load(json_path, folder, need_boxes=True), PLAIN)
    (folder / "2.png").unlink()
    for i, image_id in enumerate((5, 9, 2)):
        item = dataset[i]
        assert isinstance(item, UnreadableImage)
        assert item.image_id == image_id
        assert item.path == str(folder / f"{image_id}.png")
        assert item.reason


@pytest.mark.parametrize(
    ("stated", "size", "corner"),
    [((30, 40), (30, 40), 0), ((40, 30), (40, 30), 1), ((99, 98), (30, 40), 0)],
)
def test_exif_orientation_follows_the_stated_size(
    content: Content, write: Write, stated: tuple[int, int], size: tuple[int, int], corner: int
) -> None:
    """Orientation 6 shows the stored bottom left at the top left."""
    json_path, folder = write(content)
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[15:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif, quality=95)
    entry = content["images"][0]
    entry["file_name"], entry["height"], entry["width"] = "turned.jpg", *stated
    json_path.write_text(json.dumps(content))
    item = CocoDetection(CocoIndex.load(json_path, folder, need_boxes=True), PLAIN)[0]
    assert not isinstance(item, UnreadableImage)
    assert item[1]["orig_size"].tolist() == list(size)
    assert float(item[0][0, 3, 3]) == pytest.approx(corner, abs=0.05)


def test_boxes_are_clipped_to_the_true_image(content: Content, write: Write) -> None:
    json_path, folder = write(content)
    Image.new("RGB", (30, 20)).save(folder / "9.png")
    dataset = CocoDetection(CocoIndex.load(json_path, folder, need_boxes=True), PLAIN)
    item = dataset[1]
    assert not isinstance(item, UnreadableImage)
    assert item[1]["boxes"].tolist() == [[0.5, 0.5, 1.0, 1.0]]


def test_augmentation_depends_on_seed_epoch_and_position(content: Content, write: Write) -> None:
    index = CocoIndex.load(*write(content), need_boxes=True)
    transform = TrainTransform(
        train_scales=tuple(range(20, 60)),
        max_size=100,
        hflip=0.5,
        random_crop=True,
        crop_scales=(40, 50),
        crop_size=(20, 40),
        one_scale_per_batch=False,
        mean=MEAN,
        std=STD,
    )

    def draw(seed: int, epoch: int) -> list[torch.Tensor]:
        dataset = CocoDetection(index, transform, seed=seed)
        dataset.set_epoch(epoch)
        return [item[0] for item in map(dataset.__getitem__, range(3)) if isinstance(item, tuple)]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(draw(0, 3), draw(0, 3))
    assert not same(draw(0, 3), draw(0, 4))
    assert not same(draw(0, 3), draw(1, 3))


def test_summary_counts(content: Content, write: Write) -> None:
    content["annotations"][2]["iscrowd"] = 1
    summary = CocoIndex.load(*write(content), need_boxes=True).summary()
    assert "3 images, 2 boxes, 1 images without boxes, 1 crowd boxes, 2 classes" in summary
    assert "dog 1, cat 1" in summary
