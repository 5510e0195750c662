"""A sound set of small images, and flaws to put into it, each into an image of its own."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.checks.boxes import Limits
from datasets.formats.registry import Source

Content = dict[str, Any]
WIDTH, HEIGHT, BOXES = 64, 48, 3
LIMITS = Limits(num_queries=5, short_side=64, max_size=96)


class FlawedSet:
    """A split as content and files; flaws are told in `expected`, by kind."""

    def __init__(self, folder: Path, images: int, seed: int, first_id: int = 100) -> None:
        self.rng = np.random.default_rng(seed)
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.expected: Counter[str] = Counter()
        self.flawed: set[int] = set()
        self._boxes = self._next = 0
        self.content: Content = {
            "info": {"year": 2024},
            "images": [],
            "annotations": [],
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        }
        for number in range(images):
            self.add_image(first_id + number)
        self.sound = copy.deepcopy(self.content)

    def add_image(self, number: int) -> None:
        """Add a sound image with boxes from corner to corner."""
        name = f"p{number}.png"
        self.write(name)
        self.content["images"].append(
            {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
        )
        for k in range(BOXES):
            w, h = self.rng.integers(9, 18, 2).tolist()
            middle = self.rng.integers(0, 30, 2).tolist()
            x, y = ((0, 0), middle, (WIDTH - w, HEIGHT - h))[k]
            self.add_box(number, 3 + 4 * (k % 2), [x, y, w, h])

    def add_box(self, image_id: int, category: int, box: list[float]) -> None:
        """Add an annotation with all keys."""
        self.content["annotations"].append(
            {"id": self._boxes, "image_id": image_id, "iscrowd": 0,
             "category_id": category, "bbox": box, "area": box[2] * box[3]}
        )  # fmt: skip
        self._boxes += 1

    def write(self, name: str, **options: Any) -> None:
        """Write an image of noise, unlike any other."""
        pixels = self.rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.folder / name, **options)

    def take(self) -> Content:
        """Return the entry of the next sound image, which is sound no more."""
        image: Content = self.content["images"][self._next]
        self._next += 1
        self.flawed.add(image["id"])
        return image

    def boxes_of(self, image: Content) -> list[Content]:
        """Return the annotations of an image."""
        return [a for a in self.content["annotations"]
                if isinstance(a, dict) and a.get("image_id") == image["id"]]  # fmt: skip

    def source(self) -> Source:
        """Return the set as a reader would."""
        return Source(self.content, self.folder, self.folder / "instances.json")

    def save(self, path: Path) -> None:
        """Write the annotation file."""
        path.write_text(json.dumps(self.content))


Flaw = Callable[[FlawedSet], None]


def in_file(kind: str, change: Callable[[Path], object]) -> Flaw:
    def flaw(data: FlawedSet) -> None:
        change(data.folder / data.take()["file_name"])
        data.expected[kind] += 1

    return flaw


def in_image(kind: str, change: Callable[[Content], object], **more: int) -> Flaw:
    def flaw(data: FlawedSet) -> None:
        change(data.take())
        data.expected += Counter({kind: 1, **more})

    return flaw


def in_box(kind: str, **values: Any) -> Flaw:
    def flaw(data: FlawedSet) -> None:
        data.boxes_of(data.take())[1].update(values)
        data.expected[kind] += 1

    return flaw


def lacking(kind: str, key: str) -> Flaw:
    def flaw(data: FlawedSet) -> None:
        del data.boxes_of(data.take())[1][key]
        data.expected[kind] += 1

    return flaw


def cut(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def duplicate(data: FlawedSet) -> None:
    image = data.take()
    number = max(i["id"] for i in data.content["images"] if i.get("id")) + 1000
    name = f"copy{number}.png"
    (data.folder / name).write_bytes((data.folder / image["file_name"]).read_bytes())
    data.content["images"].append({**image, "id": number, "file_name": name})
    for box in data.boxes_of(image)[:2]:  # fewer: the first is kept
        data.add_box(number, box["category_id"], box["bbox"])
    data.expected["duplicate_image"] += 1
    data.flawed.add(number)


def exif(orientation: int, kind: str) -> Flaw:
    def flaw(data: FlawedSet) -> None:
        image = data.take()
        tags = Image.Exif()
        tags[0x0112] = orientation
        data.write(image["file_name"], exif=tags)
        data.expected[kind] += 1

    return flaw


def unused(data: FlawedSet) -> None:
    data.write(f"unused{data.expected['unused_file']}.png")
    data.expected["unused_file"] += 1


def repeat_image(data: FlawedSet) -> None:
    data.content["images"].append(dict(data.take()))
    data.expected["repeated_image"] += 1


def not_an_object(data: FlawedSet) -> None:
    data.content["annotations"].append([1, 2])
    data.expected["not_an_object"] += 1


def repeat_annotation(data: FlawedSet) -> None:
    boxes = data.boxes_of(data.take())
    boxes[2]["id"] = boxes[1]["id"]
    data.expected["repeated_annotation"] += 1


def repeat_box(data: FlawedSet) -> None:
    first = data.boxes_of(data.take())[1]
    data.add_box(first["image_id"], first["category_id"], first["bbox"])
    data.add_box(first["image_id"], 10 - first["category_id"], first["bbox"])  # 3 or 7, the other
    data.expected["repeated_bbox"] += 1


def crowd(data: FlawedSet) -> None:
    image = data.take()
    for k in range(LIMITS.num_queries):
        data.add_box(image["id"], 7, [5 + k, 6, 20, 21])
    data.expected["too_many_boxes"] += 1


def empty(data: FlawedSet) -> None:
    gone = [box["id"] for box in data.boxes_of(data.take())]
    data.content["annotations"] = [
        a for a in data.content["annotations"] if not (isinstance(a, dict) and a.get("id") in gone)
    ]
    data.expected["no_boxes"] += 1


def bad_category(data: FlawedSet) -> None:
    data.content["categories"].append({"id": 7, "name": "wolf"})
    data.expected["bad_category"] += 1


def repeat_name(data: FlawedSet) -> None:
    number = 50 + len(data.content["categories"])
    data.content["categories"].append({"id": number, "name": "dog"})
    data.expected += Counter(repeated_name=1, empty_class=1)


def empty_class(data: FlawedSet) -> None:
    number = 50 + len(data.content["categories"])
    data.content["categories"].append({"id": number, "name": f"class {number}"})
    data.expected["empty_class"] += 1


NAN = float("nan")
# `empty` looks ids up, so it comes before ids are changed.
FLAWS: dict[str, Flaw] = {
    "empty": empty,
    "missing": in_file("missing_image", lambda p: p.unlink()),
    "no image": in_file("unreadable_image", lambda p: p.write_text("no image")),
    "cut": in_file("truncated_image", cut),
    "wrong size": in_image("wrong_size", lambda i: i.update(width=WIDTH + 9)),
    "turned": exif(6, "exif_rotated"),
    "upside down": exif(3, "exif_ambiguous"),
    "unused": unused,
    "size": in_image("size_not_stated", lambda i: i.pop("width")),
    "image id": in_image("no_image_id", lambda i: i.update(id=None), unknown_image_id=BOXES,
                         unused_file=1),
    "file name": in_image("no_file_name", lambda i: i.pop("file_name"), unused_file=1),
    "outside": in_image("outside_folder", lambda i: i.update(file_name="../x.png"), unused_file=1),
    "repeated image": repeat_image,
    "duplicate": duplicate,
    "no object": not_an_object,
    "annotation id": lacking("no_annotation_id", "id"),
    "repeated id": repeat_annotation,
    "area": lacking("missing_key", "area"),
    "iscrowd": lacking("missing_key", "iscrowd"),
    "no such image": in_box("unknown_image_id", image_id=99999),
    "no such class": in_box("unknown_category_id", category_id=5),
    "no bbox": lacking("broken_bbox", "bbox"),
    "nan": in_box("broken_bbox", bbox=[1, NAN, 3, 4]),
    "text": in_box("broken_bbox", bbox=["one", 2, 3, 4]),
    "number as text": in_box("text_number", bbox=["11", 12, 13, 14]),
    "flat": in_box("zero_bbox", bbox=[3, 4, 0, 10]),
    "negative": in_box("negative_bbox", bbox=[30, 20, -12, 10]),
    "off": in_box("outside_bbox", bbox=[WIDTH + 5, 4, 9, 9]),
    "past": in_box("past_edge", bbox=[50, 4, 20, 10]),
    "fraction": in_box("normalised_bbox", bbox=[0.25, 0.25, 0.5, 0.5]),
    "speck": in_box("vanishing_bbox", bbox=[3, 4, 0.5, 10]),
    "small": in_box("small_bbox", bbox=[3, 4, 4, 10]),
    "repeated box": repeat_box,
    "crowd": crowd,
    "bad category": bad_category,
    "empty class": empty_class,
    "repeated name": repeat_name,
}  # fmt: skip


def change_all(data: FlawedSet, change: Callable[[list[float]], list[float]]) -> None:
    """Write every box in another way."""
    for annotation in data.content["annotations"]:
        annotation["bbox"] = change(annotation["bbox"])


def scaled(layout: Callable[[list[float]], list[float]], box: list[float]) -> list[float]:
    a, b, c, d = layout(box)
    return [a / WIDTH, b / HEIGHT, c / WIDTH, d / HEIGHT]


def to_xyxy(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]


def to_cxcywh(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x + w / 2, y + h / 2, w, h]


LAYOUTS: dict[str, tuple[str, Callable[[list[float]], list[float]]]] = {
    "corners": ("xyxy_bbox", to_xyxy),
    "centres": ("cxcywh_bbox", to_cxcywh),
    "fractions": ("normalised_bbox", partial(scaled, list)),
    "fractions of corners": ("normalised_bbox", partial(scaled, to_xyxy)),
    "fractions of centres": ("normalised_bbox", partial(scaled, to_cxcywh)),
    "from one": ("one_based", lambda b: [b[0] + 1, b[1] + 1, b[2], b[3]]),
    "from minus one": ("zero_based", lambda b: [b[0] - 1, b[1] - 1, b[2], b[3]]),
}
