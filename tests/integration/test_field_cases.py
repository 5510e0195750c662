"""Data as public tools write it: `check`, training, `eval` and `convert` read the same boxes.

Every image of 100 x 80 pixels has a kettle at [10, 20, 30, 40] and a mug at [60, 10, 20, 30]. A
case writes a data set as one tool does, and states what is reported and what is trained on.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.schema import DataConfig
from datasets.build import load_index
from datasets.index import CocoIndex
from tests.integration.conftest import TINY, Cli
from tests.unit.datasets.formats.exports import (
    HEIGHT,
    KETTLE,
    LINES,
    MUG,
    WIDTH,
    coco_content,
    voc_object,
    voc_text,
    write_yaml,
    yolo_line,
)

Content = dict[str, Any]
Objects = dict[str, tuple[int, ...]]
BOTH: Objects = {"kettle": KETTLE, "mug": MUG}
TRAIN, VAL = range(1, 13), range(13, 25)
CHECK = ("--train_scales", "64", "--max_size", "96", "--num_workers", "0", "--num_queries", "20")
# What only decoding, the folder or the model's limits can show, and no index reports.
CHECK_ALONE = {"unused_file", "repeated_bbox", "empty_class", "unseen_class"}


@dataclass(frozen=True)
class Written:
    """Options that lead to a data set, and the numbers of its validation images."""

    options: dict[str, str]
    val: range = VAL


@dataclass(frozen=True)
class Case:
    """A data set as a tool writes it, and what is to come of it.

    `kinds` are the findings of `check` in the training split; `objects` are those of image k that
    are trained on, `crowds` how many others `convert` writes as crowds.
    """

    write: Callable[[Path], Written]
    kinds: Mapping[str, int] = field(default_factory=dict)
    code: int = 0
    objects: Callable[[int], Objects] = lambda number: BOTH
    crowds: int = 0


def picture(number: int) -> Image.Image:
    """Return an image with its own coarse pattern, so that no two are alike."""
    coarse = np.random.default_rng(number).integers(60, 200, (8, 10, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    for (x, y, w, h), colour in ((KETTLE, (220, 40, 40)), (MUG, (40, 60, 220))):
        image.paste(colour, (x, y, x + w, y + h))
    return image


def save(folder: Path, numbers: Iterable[int], suffix: str = ".png") -> list[Path]:
    """Write images called shot_001, shot_002, ... and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in numbers:
        paths.append(folder / f"shot_{number:03d}{suffix}")
        picture(number).save(paths[-1], "JPEG" if suffix == ".jfif" else None)
    return paths


# COCO


def outline(annotation: Content) -> list[list[int]]:
    x, y, w, h = annotation["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def content_of(names: list[str]) -> Content:
    """Return COCO content with polygons on images of these names."""
    content = coco_content(names)
    for number, annotation in enumerate(content["annotations"], 1):
        annotation.update(id=number, segmentation=outline(annotation))
    return content


def coco(
    change: Callable[[Content, Path], object] = lambda content, images: None,
    encoding: str = "utf-8",
    **more: str,
) -> Callable[[Path], Written]:
    """Return a writer of a COCO-format file beside images/, after a change to the content."""

    def write(folder: Path) -> Written:
        images, file = folder / "images", folder / "ann.json"
        content = content_of([path.name for path in save(images, TRAIN)])
        change(content, images)
        file.write_bytes(json.dumps(content, ensure_ascii=encoding == "utf-8").encode(encoding))
        options = {
            f"{split}_{key}": str(path)
            for split in ("train", "val")
            for key, path in (("images", images), ("annotations", file))
        }
        return Written({**options, **more}, TRAIN)

    return write


def in_all(section: str, **values: Callable[[Content], object]) -> Callable[[Content, Path], None]:
    """Return a change that sets keys of all entries of a section, each made of the entry."""

    def change(content: Content, images: Path) -> None:
        for entry in content[section]:
            entry.update({key: value(entry) for key, value in values.items()})

    return change


def renamed(name: Callable[[str, Path], str]) -> Callable[[Content, Path], None]:
    """Return a change of file names; `name` takes the name and the folder of images."""

    def change(content: Content, images: Path) -> None:
        for entry in content["images"]:
            entry["file_name"] = name(entry["file_name"], images)

    return change


def without_boxes(content: Content, images: Path) -> None:
    for annotation in content["annotations"]:
        del annotation["bbox"]


def ids_as_text(content: Content, images: Path) -> None:
    for image in content["images"]:
        image["id"] = f"shot_{image['id']:03d}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"shot_{annotation['image_id']:03d}"


def flags_of_all_types(content: Content, images: Path) -> None:
    for number, annotation in enumerate(content["annotations"]):
        annotation["iscrowd"] = (True, "1", "0", False)[number % 4]


def in_chinese(content: Content, images: Path) -> None:
    content["categories"][0]["name"] = "\u6c34\u58f6"


def roboflow(folder: Path) -> Written:
    for split, numbers in (("train", TRAIN), ("valid", VAL)):
        content = content_of([path.name for path in save(folder / split, numbers)])
        for category in content["categories"]:
            category["supercategory"] = "kitchen"
        root = {"id": 0, "name": "kitchen", "supercategory": "none"}
        content["categories"].insert(0, root)
        for annotation in content["annotations"]:
            annotation["segmentation"] = []
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return Written({"data_path": str(folder)})


def via_coco(folder: Path) -> Written:
    """VIA's COCO export: ids are text and count from 0, polygons are single lists."""
    for split, numbers in (("train", TRAIN), ("val", VAL)):
        content = content_of([path.name for path in save(folder / split, numbers)])
        for image in content["images"]:
            image["id"] = str(image["id"] - 1)
        for annotation in content["annotations"]:
            annotation.update(
                image_id=str(annotation["image_id"] - 1),
                category_id=str(annotation["category_id"]),
                segmentation=annotation["segmentation"][0],
            )
        (folder / split / "via_export_coco.json").write_text(json.dumps(content))
    return Written({"data_path": str(folder)})


def datumaro_coco(folder: Path) -> Written:
    for split, numbers in (("train", TRAIN), ("val", VAL)):
        content = content_of([path.name for path in save(folder / "images" / split, numbers)])
        content["licenses"] = [{"name": "", "id": 0, "url": ""}]
        file = folder / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return Written({"data_path": str(folder)})


# A file for each image


def laid_out(
    images: str,
    annotations: str,
    text: Callable[[Path], str],
    *,
    val: str = "val",
    suffix: str = ".png",
    then: Callable[[Path], None] = lambda folder: None,
    **more: str,
) -> Callable[[Path], Written]:
    """Return a writer of two splits: {} is the split's name, `text` that of an image's file.

    The names of annotation files end with what follows * in `annotations`.
    """
    place, _, end = annotations.rpartition("*")

    def write(folder: Path) -> Written:
        for split, numbers in (("train", TRAIN), (val, VAL)):
            for path in save(folder / images.format(split), numbers, suffix):
                file = folder / place.format(split) / f"{path.stem}{end}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text(path))
        then(folder)
        return Written({"data_path": str(folder), **more})

    return write


# VOC


def voc_xml(path: Path) -> str:
    return voc_text(name=path.name)


def voc(
    body: Callable[[int], str] = lambda number: (
        voc_object("kettle", KETTLE) + voc_object("mug", MUG)
    ),
    suffix: str = ".png",
    **more: str,
) -> Callable[[Path], Written]:
    """Return a writer of VOC's folders and lists."""

    def write(folder: Path) -> Written:
        for split, numbers in (("train", TRAIN), ("val", VAL)):
            paths = save(folder / "JPEGImages", numbers, suffix)
            for number, path in zip(numbers, paths, strict=True):
                file = folder / "Annotations" / f"{path.stem}.xml"
                file.parent.mkdir(exist_ok=True)
                file.write_text(voc_text(body(number), path.name))
            listed = folder / "ImageSets" / "Main" / f"{split}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("".join(f"{path.stem}\n" for path in paths))
        return Written({"data_path": str(folder), **more})

    return write


def voc_sizes(number: int) -> str:
    """Return objects whose xmax and ymax hold width and height."""
    return "".join(voc_object(name, (x, y, w - x, h - y)) for name, (x, y, w, h) in BOTH.items())


def voc_ampersand(folder: Path) -> Written:
    """An & that is not escaped in one name, and a file in an encoding that it declares."""
    written = voc(voc_corners="edges")(folder)
    first, second = (folder / "Annotations" / f"shot_{k:03d}.xml" for k in (1, 2))
    first.write_text(first.read_text().replace("<name>kettle", "<name>pot & kettle"))
    text = second.read_text().replace("<name>kettle", "<name>\u6c34\u58f6")
    second.write_bytes(f'<?xml version="1.0" encoding="gbk"?>{text}'.encode("gbk"))
    return written


def cvat_voc(folder: Path) -> Written:
    """CVAT knows one split, called default, unless its tasks have subsets."""
    written = voc(train_split="default", val_split="default", voc_corners="edges")(folder)
    (folder / "ImageSets" / "Main" / "train.txt").rename(folder / "ImageSets/Main/default.txt")
    (folder / "ImageSets" / "Main" / "val.txt").unlink()
    (folder / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nkettle:::\nmug:::\n")
    return Written(written.options, TRAIN)


# labelme


def labelme(path: Path) -> str:
    (x, y, w, h), (left, top, width, height) = KETTLE, MUG
    shapes = [
        {"label": "kettle", "points": [[x + w, y + h], [x, y]], "shape_type": "rectangle"},
        {"label": "mug", "shape_type": "polygon", "points": [
            [left, top], [left + width, top], [left + width / 2, top + height]]},
    ]  # fmt: skip
    content: Content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imageData": None,
               "imagePath": path.name, "imageHeight": HEIGHT, "imageWidth": WIDTH}  # fmt: skip
    return json.dumps(content)


def anylabeling(path: Path) -> str:
    """X-AnyLabeling: boxes of four corners, and the images in another folder."""
    content = json.loads(labelme(path))
    x, y, w, h = KETTLE
    corners = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
    content["shapes"][0].update(points=corners, difficult=False, attributes={})
    content["imagePath"] = f"../images/{path.name}"
    return json.dumps(content)


# YOLO


def yolo(
    lines: str = LINES,
    images: str = "{}/images",
    labels: str = "{}/labels",
    val: str = "val",
    yaml: Mapping[str, str] | None = None,
    then: Callable[[Path], None] = lambda folder: None,
    root: str = "",
) -> Callable[[Path], Written]:
    """Return a writer of images and label files of two splits, with data.yaml in `root`."""

    def finish(folder: Path) -> None:
        named = {"train": images.format("train"), "val": images.format(val)}
        write_yaml(folder / root, **(named if yaml is None else yaml))
        then(folder)

    return laid_out(f"{root}{images}", f"{root}{labels}/*.txt", lambda path: lines, val=val,
                    then=finish)  # fmt: skip


def obb_line(label: int, box: tuple[int, ...]) -> str:
    """Return four corners, as of a rotated box."""
    x, y, w, h = box
    corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
    return " ".join([str(label), *(f"{a / WIDTH:.6f} {b / HEIGHT:.6f}" for a, b in corners)]) + "\n"


def pose_line(label: int, box: tuple[int, ...]) -> str:
    x, y, w, h = box
    point = f" {(x + w / 2) / WIDTH:.6f} {(y + h / 2) / HEIGHT:.6f} 2"
    return yolo_line(label, box, 4 * point)


def both_lines(line: Callable[[int, tuple[int, ...]], str]) -> str:
    return line(0, KETTLE) + line(1, MUG)


def lists_of_images(folder: Path) -> None:
    """CVAT's export for ultralytics: lists of paths in a folder that is not there."""
    for split, numbers in (("train", TRAIN), ("val", VAL)):
        names = [f"data/images/{split}/shot_{k:03d}.png\n" for k in numbers]
        (folder / f"{split}.txt").write_text("".join(names))


def darknet(folder: Path) -> None:
    for split, numbers in (("train", TRAIN), ("test", VAL)):
        names = [f"data/obj/shot_{k:03d}.png\n" for k in numbers]
        (folder / "data" / f"{split}.txt").write_text("".join(names))
    (folder / "data" / "obj.names").write_text("kettle\nmug\n\n")
    (folder / "data" / "obj.data").write_text(
        "classes = 2\ntrain  = data/train.txt\nvalid  = data/test.txt\n"
        "names = data/obj.names\nbackup = backup/\n"
    )


def yolo_without_yaml(folder: Path) -> Written:
    for path in save(folder / "images", TRAIN):
        file = folder / "labels" / f"{path.stem}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(LINES)
    (folder / "classes.txt").write_text("kettle\nmug\n")
    names = [{"id": k, "name": name} for k, name in enumerate(BOTH)]
    (folder / "notes.json").write_text(json.dumps({"categories": names, "info": {"year": 2026}}))
    return Written({"data_path": str(folder)}, TRAIN)


def files_of_a_mac(folder: Path) -> None:
    for path in [*folder.rglob("*.png"), *folder.rglob("*.txt")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(4092))
    for split in ("train", "val"):
        (folder / split / "images" / ".DS_Store").write_bytes(bytes(64))
        (folder / split / "labels.cache").write_bytes(b"\x93NUMPY")


def half_as_jfif(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png"))[::2]:
        Image.open(path).save(path.with_suffix(".jfif"), "JPEG")
        path.unlink()


def only_kettles(number: int) -> Objects:
    return {"kettle": KETTLE}


CORNERS = " 0.15 0.60 0.35 0.60 0.35 0.70 0.15 0.70"  # of a plate, inside the kettle
CASES: dict[str, Case] = {
    "plain": Case(coco()),
    "str_category_id": Case(
        coco(in_all("annotations", category_id=lambda a: str(a["category_id"]),
                    iscrowd=lambda a: 0.0, segmentation=lambda a: None,
                    pose=lambda a: "Unspecified", truncated=lambda a: "0",
                    difficult=lambda a: "0")),
        {"text_number": 24},
    ),
    "str_bbox": Case(
        coco(in_all("annotations", bbox=lambda a: [f"{v:.1f}" for v in a["bbox"]],
                    area=lambda a: f"{a['area']:.1f}")),
        {"text_number": 24},
    ),
    "str_all_ids": Case(coco(ids_as_text), {"text_id": 36}),
    "no_bbox_polygons": Case(coco(without_boxes), {"computed_bbox": 24}),
    "crowd_bool": Case(
        coco(flags_of_all_types), {"text_number": 12, "no_boxes": 6},
        objects=lambda number: {} if number % 2 else BOTH, crowds=12,
    ),
    "ignore_key": Case(
        coco(in_all("annotations", ignore=lambda a: int(a["category_id"] == 2))),
        {"ignored_as_crowd": 12, "empty_class": 1}, objects=only_kettles, crowds=12,
    ),
    "ignore_key_kept": Case(
        coco(in_all("annotations", ignore=lambda a: int(a["category_id"] == 2)),
             ignore_key="keep"),
        {"ignored_kept": 12},
    ),
    "all_crowd_as_objects": Case(
        coco(in_all("annotations", iscrowd=lambda a: 1), crowd="as_objects"),
        {"crowd_as_object": 24},
    ),
    "cvat_rotation": Case(
        coco(in_all("annotations", segmentation=lambda a: [],
                    attributes=lambda a: {"occluded": False, "rotation": 45.0})),
        {"rotated_bbox": 24},
    ),
    "windows_slashes": Case(
        coco(renamed(lambda name, images: f"images\\{name}")), {"matched_name": 12}
    ),
    "label_studio_project": Case(
        coco(renamed(lambda name, images: f"images/1/{name}")), {"matched_name": 12}
    ),
    "folder_twice": Case(
        coco(renamed(lambda name, images: f"images/{name}")), {"matched_name": 12}
    ),
    "absolute_names": Case(
        coco(renamed(lambda name, images: str(images / name))), {"matched_name": 12}
    ),
    "no_suffix": Case(
        coco(renamed(lambda name, images: name[:-4])), {"matched_name": 12}
    ),
    "roboflow": Case(roboflow, {"detected_format": 1, "root_category": 1}),
    "voc_size_corners": Case(
        voc(voc_sizes, voc_corners="size"), {"detected_format": 1, "unused_file": 12}
    ),
    "voc_flat": Case(
        laid_out("{}", "{}/*.xml", voc_xml, val="valid", voc_corners="edges"),
        {"detected_format": 1},
    ),
    "voc_suffix_jfif": Case(
        voc(suffix=".jfif", voc_corners="edges"), {"detected_format": 1, "unused_file": 12}
    ),
    "voc_ampersand": Case(
        voc_ampersand, {"detected_format": 1, "repaired_annotation": 2, "unused_file": 12},
        objects=lambda number: {
            {1: "pot & kettle", 2: "\u6c34\u58f6"}.get(number, "kettle"): KETTLE, "mug": MUG
        },
    ),
    "yolo_plain": Case(yolo(), {"detected_format": 1}),
    "yolo_no_yaml": Case(yolo_without_yaml, {"detected_format": 1, "odd_layout": 1}),
    "yolo_images_above": Case(
        yolo(root="images/project_7/", images="{}", labels="{}"), {"detected_format": 1}
    ),
    "yolo_valid_key": Case(
        yolo(val="valid", yaml={"train": "../train/images", "valid": "../valid/images"}),
        {"detected_format": 1, "odd_layout": 1},
    ),
    "yolo_upper_labels": Case(
        yolo(images="{}/Images", labels="{}/Labels"), {"detected_format": 1}
    ),
    "yolo_mac_files": Case(yolo(then=files_of_a_mac), {"detected_format": 1}),
    "yolo_jfif": Case(yolo(then=half_as_jfif), {"detected_format": 1}),
    "yolo_plate": Case(
        yolo(lines=yolo_line(0, KETTLE, CORNERS)),
        {"detected_format": 1, "long_lines": 1, "empty_class": 1}, objects=only_kettles,
    ),
    "yolo_class_beyond": Case(
        yolo(lines=yolo_line(1, KETTLE) + yolo_line(2, MUG)),
        {"detected_format": 1, "one_based_class": 1, "unknown_category_id": 12, "empty_class": 1},
        code=1, objects=lambda number: {"mug": KETTLE},
    ),
    # What other tools write
    "via_coco": Case(via_coco, {"detected_format": 1, "text_number": 36}),
    "datumaro_coco": Case(datumaro_coco, {"detected_format": 1}),
    "cvat_voc": Case(cvat_voc, {"detected_format": 1, "unused_file": 12}),
    "fiftyone_voc": Case(
        laid_out("{}/data", "{}/labels/*.xml", voc_xml, voc_corners="edges"),
        {"detected_format": 1},
    ),
    "labelme": Case(laid_out("{}", "{}/*.json", labelme), {"detected_format": 1}),
    "anylabeling": Case(
        laid_out("{}/images", "{}/labels/*.json", anylabeling), {"detected_format": 1}
    ),
    "cvat_ultralytics": Case(
        yolo(images="images/{}", labels="labels/{}", then=lists_of_images,
             yaml={"path": ".", "train": "train.txt", "val": "val.txt"}),
        {"detected_format": 1, "odd_layout": 1},
    ),
    "fiftyone_yolov5": Case(
        yolo(images="images/{}", labels="labels/{}",
             yaml={"path": "/home/me/set", "train": "./images/train/", "val": "./images/val/"}),
        {"detected_format": 1},
    ),
    "darknet": Case(
        laid_out("data/obj", "data/obj/*.txt", lambda path: LINES, then=darknet),
        {"detected_format": 1, "odd_layout": 1, "unused_file": 12},
    ),
    "ultralytics_obb": Case(
        yolo(lines=both_lines(obb_line)), {"detected_format": 1, "long_lines": 1}
    ),
    "ultralytics_pose": Case(
        yolo(lines=both_lines(pose_line),
             yaml={"train": "train/images", "val": "val/images", "kpt_shape": "[4, 3]"}),
        {"detected_format": 1, "long_lines": 1},
    ),
}  # fmt: skip


def words(options: Mapping[str, str], *, only: str = "") -> list[str]:
    """Return options of the command line; with `only`, without those of the other split."""
    other = {"train": "val_", "val": "train_", "": "\0"}[only]
    return [w for k, v in options.items() if not k.startswith(other) for w in (f"--{k}", v)]


def to_convert(options: Mapping[str, str]) -> list[str]:
    """Return the options that make `convert` read the training split."""
    named = {"train_annotations": "data_path", "train_images": "images"}
    kept = {named.get(k, k): v for k, v in options.items() if not k.startswith("val_")}
    split = kept.pop("train_split", "train")
    return [*words(kept), "--splits", split]


def trained_on(index: CocoIndex) -> set[tuple[object, ...]]:
    """Return the image, class and corners of each box that training uses."""
    return {
        (Path(name).stem, index.classes.names[label], *map(float, box))
        for number, name in enumerate(index.images.file_names)
        for label, box in zip(
            index.labels[index.first[number] : index.first[number + 1]],
            index.boxes[index.first[number] : index.first[number + 1]],
            strict=True,
        )
    }


def truth(case: Case, numbers: Iterable[int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the image, class and x, y, width, height of each object."""
    return [(f"shot_{k:03d}", name, box) for k in numbers for name, box in case.objects(k).items()]


@pytest.mark.parametrize("name", CASES)
def test_every_command_reads_what_the_tool_meant(name: str, cli: Cli, tmp_path: Path) -> None:
    case = CASES[name]
    written = case.write(tmp_path / "set")
    train = truth(case, TRAIN)

    done = cli("check", *words(written.options, only="train"), *CHECK, "--splits", "train",
               "--output_dir", tmp_path / "look")  # fmt: skip
    assert done.returncode == case.code, done.stderr
    found = json.loads((tmp_path / "look" / "check.json").read_text())
    kinds = {finding["kind"]: finding["count"] for finding in found["findings"]}
    assert kinds == case.kinds
    assert found["splits"]["train"]["usable_boxes"] == len(train)

    index = load_index(DataConfig(**written.options), "train")  # type: ignore[arg-type]
    assert len(index) == len(TRAIN)
    assert trained_on(index) == {
        (image, label, *map(float, (x, y, x + w, y + h))) for image, label, (x, y, w, h) in train
    }
    reported = {finding.kind for finding in index.findings}
    assert reported == kinds.keys() - CHECK_ALONE

    done = cli("convert", *to_convert(written.options), "--output_dir", tmp_path / "coco")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "coco" / "annotations").iterdir()
    content = json.loads(file.read_text())
    image = {entry["id"]: Path(entry["file_name"]).stem for entry in content["images"]}
    label = {entry["id"]: entry["name"] for entry in content["categories"]}
    objects = {
        (image[a["image_id"]], label[a["category_id"]], tuple(a["bbox"]))
        for a in content["annotations"] if not a["iscrowd"]
    }  # fmt: skip
    assert objects == set(train)
    assert len(content["annotations"]) == len(train) + case.crowds

    detections = [
        {"image_id": stem, "category_id": label, "bbox": box, "score": 0.9}
        for stem, label, box in truth(case, written.val)
    ]
    (tmp_path / "found.json").write_text(json.dumps(detections))
    done = cli("eval", "--detections", tmp_path / "found.json", *words(written.options, only="val"),
               "--output_dir", tmp_path, "--no_analysis")  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["stats"]["AP"] == pytest.approx(1.0)


REFUSED: dict[str, tuple[Callable[[Path], Written], str, tuple[int, int, int]]] = {
    "all_crowd": (
        coco(in_all("annotations", iscrowd=lambda a: 1)),
        "crowds instead of objects: 24", (1, 0, 0),
    ),
    "gbk": (coco(in_chinese, "gbk"), "not in UTF-8 (line 1): as gb18030 it says", (2, 2, 2)),
    "yolo_pixels": (
        yolo(lines="0 25 40 30 40\n1 70 25 20 30\n"), "Are they pixels?", (1, 2, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_the_reason(
    name: str, cli: Cli, tmp_path: Path
) -> None:
    """The exit codes of `check`, `convert` and `eval` are stated; a refusal writes nothing."""
    write, message, codes = REFUSED[name]
    options = write(tmp_path / "set").options
    (tmp_path / "found.json").write_text("[]")
    out = tmp_path / "out"
    commands = (
        ("check", *words(options, only="train"), *CHECK, "--splits", "train"),
        ("convert", *to_convert(options), "--output_dir", out),
        ("eval", "--detections", tmp_path / "found.json", *words(options, only="val"),
         "--output_dir", tmp_path, "--no_analysis"),
        ("train", "--config", TINY, *words(options), "--output_dir", tmp_path / "run"),
    )  # fmt: skip
    for command, code in zip(commands, (*codes, 2), strict=True):
        done = cli(*command)
        assert done.returncode == code, done.stderr
        if code == 2:
            (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
            assert message in line
        else:
            assert "error: " not in done.stderr
    assert out.exists() == (codes[1] == 0)
    assert (tmp_path / "eval").exists() == (codes[2] == 0)


def test_corners_that_seem_to_be_sizes_are_reported_by_every_command(
    cli: Cli, tmp_path: Path
) -> None:
    """Which boxes are meant, `voc_corners` says: see `voc_size_corners` above."""
    options = voc(voc_sizes)(tmp_path / "set").options
    message = "12 of 24 boxes have xmax or ymax below xmin or ymin"
    done = cli("check", *words(options), *CHECK, "--splits", "train")
    assert done.returncode == 1
    assert "(size_corners)" in done.stdout
    done = cli("convert", *words(options), "--output_dir", tmp_path / "out")
    assert message in done.stdout
    (tmp_path / "found.json").write_text("[]")
    done = cli("eval", "--detections", tmp_path / "found.json", *words(options),
               "--output_dir", tmp_path, "--no_analysis")  # fmt: skip
    assert message in done.stdout
    index = load_index(DataConfig(**options), "train")  # type: ignore[arg-type]
    assert any(message in notice for notice in index.notices)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["str_all_ids", "no_bbox_polygons", "roboflow", "voc_ampersand", "yolo_plate"]
)
def test_a_run_trains_on_the_boxes_that_check_counts(name: str, cli: Cli, tmp_path: Path) -> None:
    case = CASES[name]
    options = case.write(tmp_path / "set").options
    done = cli("check", *words(options), *CHECK, "--output_dir", tmp_path / "look")
    checked = json.loads((tmp_path / "look" / "check.json").read_text())["splits"]
    done = cli("train", "--config", TINY, *words(options), "--epochs", "1", "--no_probe",
               "--no_tensorboard", "--output_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    for split, numbers in checked.items():
        assert report[split]["images"] == numbers["images"]
        assert report[split]["boxes"] == numbers["usable_boxes"]
    done = cli("eval", "--checkpoint", tmp_path / "run" / "last.pth", "--no_analysis")
    assert done.returncode == 0, done.stderr
