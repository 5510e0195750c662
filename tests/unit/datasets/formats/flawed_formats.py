"""A sound set of two splits in COCO, VOC or YOLO layout, and flaws to put into its images.

Each flaw is put into an image of its own, named by its number; it returns what training and
`check` must report. Notes of `check` (no harm in them) are not counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datasets.formats.convert import convert
from datasets.formats.registry import Source

Content = dict[str, Any]
Kinds = Counter[str]
WIDTH, HEIGHT, NUM_IMAGES = 40, 30, 5  # images of a split
SPLITS = ("train", "val")
FORMATS = ("coco", "voc", "yolo")


class Expected(NamedTuple):
    """Counts by kind: findings of training, flaws of `check`; images that cannot be read."""

    training: Kinds
    check: Kinds
    unreadable: int = 0

    def __add__(self, other: "Expected") -> "Expected":  # type: ignore[override]
        return Expected(
            self.training + other.training,
            self.check + other.check,
            self.unreadable + other.unreadable,
        )


def noting(kind: str) -> Expected:
    """Return what is reported, but is no flaw."""
    return Expected(Counter({kind: 1}), Counter())


NOTHING = Expected(Counter(), Counter())
Flaw = Callable[[str, Path, int], Expected]


def split_of(number: int) -> str:
    """Return the split that image `number` belongs to."""
    return SPLITS[number // NUM_IMAGES]


def content_of(split: str) -> Content:
    """Return the content of a split as a COCO file: two boxes an image, a cat and a dog."""
    first = NUM_IMAGES * SPLITS.index(split)
    numbers = range(first, first + NUM_IMAGES)
    return {
        "images": [
            {"id": 10 * i, "file_name": f"p{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in numbers
        ],
        "annotations": [
            {"id": 2 * i + k, "image_id": 10 * i, "category_id": 3 + 4 * k, "iscrowd": 0,
             "area": 10 * (5 + i), "bbox": [2 + i, 3 + k, 10, 5 + i]}
            for i in numbers for k in range(2)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }  # fmt: skip


def write_sound(folder: Path, target: str) -> Path:
    """Write the set without flaws under `folder`; return its place."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES * len(SPLITS)):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"p{number}.png")
    sources = {split: Source(content_of(split), images, folder) for split in SPLITS}
    convert(sources, target, folder / "set", copy=True)
    return folder / "set"


def add_flaws(target: str, place: Path, split: str, chosen: Sequence[int]) -> Expected:
    """Put flaws, by their positions in FLAWS, into images of a split, all but its first."""
    expected = NOTHING
    first = NUM_IMAGES * SPLITS.index(split)
    for number, flaw in enumerate(chosen, first + 1):
        expected += FLAWS[target][flaw](target, place, number)
    return expected


def sound_images(split: str, flaws: int) -> list[str]:
    """Return the names, without suffix, of the images that the first `flaws` flaws leave."""
    first = NUM_IMAGES * SPLITS.index(split)
    return [f"p{n}" for n in (first, *range(first + 1 + flaws, first + NUM_IMAGES))]


def image_file(target: str, place: Path, number: int) -> Path:
    """Return where an image is."""
    split = split_of(number)
    folder = {"coco": f"{split}2017", "voc": "JPEGImages", "yolo": f"images/{split}"}[target]
    return place / folder / f"p{number}.png"


def label_file(target: str, place: Path, number: int) -> Path:
    """Return where the annotations of an image are, in VOC or YOLO layout."""
    folder, suffix = (
        ("Annotations", ".xml") if target == "voc" else (f"labels/{split_of(number)}", ".txt")
    )
    return place / folder / f"p{number}{suffix}"


def remove_image(target: str, place: Path, number: int) -> Expected:
    """Delete the file; in YOLO layout only its labels remain."""
    image_file(target, place, number).unlink()
    if target == "yolo":
        return in_both("label_without_image")
    return in_both("missing_image")._replace(unreadable=1)


def cut_image(target: str, place: Path, number: int) -> Expected:
    """Cut the file off after its header."""
    file = image_file(target, place, number)
    file.write_bytes(file.read_bytes()[:60])
    return Expected(Counter(), Counter(truncated_image=1), unreadable=1)


def replace_image(target: str, place: Path, number: int) -> Expected:
    """Write text in place of the image."""
    image_file(target, place, number).write_text("no image")
    if target == "yolo":  # sizes come from the files, and boxes in pixels from sizes
        return in_both("unreadable_image", unreadable_annotation=1)._replace(unreadable=1)
    return in_both("unreadable_image")._replace(unreadable=1)


def in_both(kind: str, **more: int) -> Expected:
    """Return one of `kind`, with `more`, in training and in the check alike."""
    counts = Counter({kind: 1, **more})
    return Expected(counts, counts)


def in_json(expected: Expected, change: Callable[[Content, Content, Content], object]) -> Flaw:
    """Return a flaw that changes (content, image, its first annotation) of a COCO file."""

    def flaw(target: str, place: Path, number: int) -> Expected:
        file = place / "annotations" / f"instances_{split_of(number)}2017.json"
        content = json.loads(file.read_bytes())
        image = next(i for i in content["images"] if i.get("file_name") == f"p{number}.png")
        own = (a for a in content["annotations"] if isinstance(a, dict))
        annotation = next(a for a in own if a["image_id"] == image["id"])
        change(content, image, annotation)
        file.write_text(json.dumps(content))
        return expected

    return flaw


def in_text(expected: Expected, old: str, new: str) -> Flaw:
    """Return a flaw that replaces text in an image's annotation file, once."""

    def flaw(target: str, place: Path, number: int) -> Expected:
        file = label_file(target, place, number)
        text = file.read_text()
        start = old.format(x=2 + number + 1)
        assert start in text
        file.write_text(text.replace(start, new.format(old=start), 1))
        return expected

    return flaw


def drop_labels(expected: Expected) -> Flaw:
    """Return a flaw that deletes an image's annotation file."""

    def flaw(target: str, place: Path, number: int) -> Expected:
        label_file(target, place, number).unlink()
        return expected

    return flaw


def set_bbox(box: object, content: Content, image: Content, annotation: Content) -> None:
    """Change the box of an annotation."""
    annotation["bbox"] = box


def yolo(expected: Expected, line: str) -> Flaw:
    """Return a flaw that puts a line before the first."""
    return in_text(expected, "0 ", line + "\n{old}")


BROKEN: list[object] = [None, [1, 2, 3], [1, 2, float("nan"), 4], [1, 2, "three", 4], {}, 7]
_COMMON: list[Flaw] = [remove_image, cut_image, replace_image]
FLAWS: dict[str, list[Flaw]] = {
    "coco": [
        *_COMMON,
        *(in_json(in_both("broken_bbox"), partial(set_bbox, box)) for box in BROKEN),
        *(in_json(expected, partial(set_bbox, box)) for expected, box in (
            (in_both("zero_bbox"), [5, 5, 0, 3]),
            (in_both("negative_bbox"), [5, 5, 4, -3]),
            (in_both("outside_bbox"), [50, 5, 4, 3]),
            (in_both("past_edge"), [30, 5, 40, 3]),
        )),
        in_json(in_both("unknown_image_id"), lambda c, i, a: a.update(image_id=777)),
        in_json(in_both("unknown_category_id"), lambda c, i, a: a.update(category_id="lynx")),
        in_json(in_both("not_an_object"), lambda c, i, a: c["annotations"].append([1])),
        in_json(in_both("repeated_image"), lambda c, i, a: c["images"].append(i)),
        in_json(in_both("outside_folder"),
                lambda c, i, a: i.update(file_name="../x")),
        in_json(in_both("no_file_name"), lambda c, i, a: i.pop("file_name")),
        in_json(in_both("no_image_id", unknown_image_id=2),
                lambda c, i, a: i.update(id=None)),
        in_json(in_both("missing_key"), lambda c, i, a: a.pop("area")),
        in_json(noting("text_number"), lambda c, i, a: a.update(bbox="2 3 10 5")),
        in_json(noting("ignored_as_crowd"), lambda c, i, a: a.update(ignore="true")),
        in_json(noting("matched_name"),
                lambda c, i, a: i.update(file_name="far\\away\\" + i["file_name"])),
        in_json(noting("computed_bbox"),
                lambda c, i, a: a.update(bbox=[], segmentation=[[2, 3, 12, 3, 12, 8]])),
        in_json(in_both("missing_key"), lambda c, i, a: a.update(iscrowd="no")),
        in_json(in_both("size_not_stated"), lambda c, i, a: i.pop("width")),
        in_json(in_both("wrong_size"), lambda c, i, a: i.update(width=WIDTH + 9)),
    ],
    "voc": [
        *_COMMON,
        in_text(in_both("unreadable_annotation"), "</size>", "</sise>"),
        *(in_text(in_both("broken_bbox", missing_key=1),
                  "<xmin>{x}</xmin>", new) for new in ("<xmin>left</xmin>", "")),
        in_text(in_both("negative_bbox", missing_key=1),
                "<xmin>{x}</xmin>", "<xmin>39</xmin>"),
        in_text(in_both("outside_bbox"), "<xmin>{x}</xmin>", "<xmin>45</xmin><xmax>49</xmax>"),
        in_text(in_both("unknown_category_id"), "<name>cat</name>", "<name> </name>"),
        in_text(in_both("size_not_stated"), "<width>40</width>", "<width>wide</width>"),
        in_text(in_both("wrong_size"), "<width>40</width>", "<width>49</width>"),
        drop_labels(in_both("unreadable_annotation")),
    ],
    "yolo": [
        *_COMMON,
        *(yolo(in_both("unreadable_annotation"), line)
          for line in ("cat 1 2 3 4", "0 0.5", "0.5 0 0 1 1", "inf")),
        yolo(in_both("broken_bbox"), "0 nan 0.5 0.1 0.1"),
        yolo(in_both("zero_bbox"), "0 0.5 0.5 0 0.1"),
        yolo(in_both("outside_bbox"), "0 5 0.5 0.1 0.1"),
        yolo(in_both("unknown_category_id"), "9 0.5 0.5 0.1 0.1"),
        drop_labels(Expected(Counter(no_boxes=1), Counter())),
    ],
}  # fmt: skip
