"""VOC and YOLO folders read as the content of a COCO-format file."""

import io
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datasets.dataset import CocoDetection
from datasets.formats.convert import convert
from datasets.formats.registry import Source, read_source
from datasets.index import CocoIndex
from datasets.transforms import EvalTransform
from util.errors import DataError

Shared = Callable[[str], Path]
PLAIN = EvalTransform(eval_scale=16, max_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)


def save_image(path: Path, width: int, height: int, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(path, exif=exif)


def voc_object(name: str, corners: tuple[object, ...], extra: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Write images b and a (listed for training) and c (for validation), each of 40x30."""
    objects = {
        "a": voc_object("dog", (1, 1, 40, 30)),
        "b": voc_object("cat", (3, 4, 3, 8)) + voc_object("dog", ("2.5", 1, 9, 9)),
        "c": voc_object("ant", (1, 1, 9, 9), "<difficult>1</difficult>"),
    }
    for stem, body in objects.items():
        save_image(tmp_path / "JPEGImages" / f"{stem}.jpg", 40, 30)
        size = "<size><width>40</width><height>30</height></size>"
        path = tmp_path / "Annotations" / f"{stem}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<annotation><filename>x.jpg</filename>\n{size}{body}</annotation>")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b  1\na -1\n\n")
    (lists / "val.txt").write_text("c\n")
    return tmp_path


def found(source: Source) -> dict[str, list[tuple[str, str]]]:
    """Return where and why something could not be read, by kind."""
    return {kind: list(findings) for kind, findings in source.findings.items() if findings}


def boxes(source: Source) -> list[list[float]]:
    return [annotation["bbox"] for annotation in source.content["annotations"]]


def test_voc_pixels_count_from_one_and_end_inclusive(voc: Path) -> None:
    source = read_source("voc", voc, "train")
    assert source.image_dir == voc / "JPEGImages"
    assert [entry["file_name"] for entry in source.content["images"]] == ["a.jpg", "b.jpg"]
    assert source.content["images"][0] == {
        "id": 1, "file_name": "a.jpg", "width": 40, "height": 30,
    }  # fmt: skip
    assert boxes(source) == [[0, 0, 40, 30], [2, 3, 1, 5], [1.5, 0, 7.5, 9]]
    assert found(source) == {}


def test_voc_edges_are_taken_as_they_are(voc: Path) -> None:
    source = read_source("voc", voc, "train", voc_corners="edges")
    assert boxes(source) == [[1, 1, 39, 29], [3, 4, 0, 4], [2.5, 1, 6.5, 8]]


def test_voc_splits_have_the_same_classes_and_difficult_is_ignored(voc: Path) -> None:
    train, val = read_source("voc", voc, "train"), read_source("voc", voc, "val")
    assert [(c["id"], c["name"]) for c in val.content["categories"]] == [
        (1, "ant"), (2, "cat"), (3, "dog"),
    ]  # fmt: skip
    assert val.content["categories"] == train.content["categories"]
    assert [a["category_id"] for a in train.content["annotations"]] == [3, 2, 3]
    assert [a["iscrowd"] for a in val.content["annotations"]] == [1]
    assert not any(a["iscrowd"] for a in train.content["annotations"])


def test_voc_without_lists_is_all_images(voc: Path) -> None:
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match=r"train.txt: the split 'train' has no list. Lists there: none"
    ):
        read_source("voc", voc, "train")
    (voc / "ImageSets" / "Main").rmdir()
    (voc / "ImageSets" / "labels.txt").write_text("ant\ncat\ndog\n")
    assert len(read_source("voc", voc, "train").content["images"]) == 3

    assert found(read_source("voc", voc, "train")) == {
        "odd_layout": [
            (voc.name, "no lists in ImageSets/: every split is all 3 files, train as val")
        ]
    }


def test_voc_lists_may_be_in_the_upper_folder(voc: Path) -> None:
    sets = voc / "ImageSets"
    for path in (sets / "Main").iterdir():
        path.rename(sets / path.name)
    for split, count in (("train", 2), ("val", 1)):
        source = read_source("voc", voc, split)
        assert len(source.content["images"]) == count
        assert found(source) == {}
    (sets / "val.txt").rename(sets / "mine.txt")
    (sets / "train.txt").unlink()
    assert len(read_source("voc", voc, "mine").content["images"]) == 1


def test_voc_lists_as_tools_and_people_write_them(voc: Path) -> None:
    path = voc / "ImageSets" / "Main" / "train.txt"
    path.write_bytes("\ufeffb.jpg\r\nJPEGImages/a.jpg 1\r\n".encode())
    source = read_source("voc", voc, "train")
    assert [entry["file_name"] for entry in source.content["images"]] == ["a.jpg", "b.jpg"]
    assert found(source) == {}
    path.write_text("nobody\n")
    with pytest.raises(
        DataError,
        match=r"Annotations/ has no XML files for the split 'train', .* 1 names \('nobody'\)",
    ):
        read_source("voc", voc, "train")


def test_voc_images_of_one_stem_are_distinguished_by_suffix(voc: Path) -> None:
    save_image(voc / "JPEGImages" / "a.png", 40, 30)
    for suffix in (".png", ".jpg"):
        body = f"<filename>a{suffix}</filename>" + voc_object("dog", (1, 1, 4, 4))
        (voc / "Annotations" / "a.xml").write_text(f"<annotation>{body}</annotation>")
        image = read_source("voc", voc, "train").content["images"][0]
        assert image["file_name"] == f"a{suffix}"


def test_voc_damage_is_named_by_line_and_left_out(voc: Path) -> None:
    (voc / "Annotations" / "a.xml").write_text("<annotation>\n<object></annotation>")
    (voc / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nnowhere\n")
    source = read_source("voc", voc, "train")
    assert [entry["file_name"] for entry in source.content["images"]] == ["b.jpg"]
    (damaged, why), missing = found(source)["unreadable_annotation"]
    assert damaged == "a.xml:2"
    assert why.startswith("mismatched tag")
    assert missing == ("nowhere.xml", "no such file")


def test_voc_boxes_that_are_no_numbers_are_kept_for_the_check(voc: Path) -> None:
    body = voc_object("cat", ("one", 2, 3, 4)) + "<object><name>cat</name></object>"
    (voc / "Annotations" / "a.xml").write_text(f"<annotation>{body}</annotation>")
    content = read_source("voc", voc, "train").content
    assert [a["bbox"] for a in content["annotations"]][:2] == [None, None]
    assert "width" not in content["images"][0]


@pytest.mark.long
def test_bccd_with_edges_is_its_coco_file(shared: Shared) -> None:
    """The COCO file beside it takes the corners as edges, and left out one box without area."""
    folder = shared("datasets/bccd")
    source = read_source("voc", folder / "BCCD", "train", voc_corners="edges")

    def named(content: dict[str, Any]) -> set[tuple[Any, ...]]:
        files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        return {
            (files[a["image_id"]], names[a["category_id"]], *a["bbox"])
            for a in content["annotations"]
        }

    theirs = json.loads((folder / "annotations" / "instances_train.json").read_bytes())
    only_here = named(source.content) - named(theirs)
    assert only_here == {("BloodImage_00343.jpg", "RBC", 181.0, 329.0, 0.0, 0.0)}
    assert named(theirs) < named(source.content)


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Write three training images, one on its side, one without labels, and one to validate."""
    (tmp_path / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: val.txt\nnames: {0: cat, 2: dog}\n"
    )
    save_image(tmp_path / "images" / "train" / "b.jpg", 40, 20)
    save_image(tmp_path / "images" / "train" / "deep" / "a.jpg", 40, 20, orientation=6)
    save_image(tmp_path / "images" / "train" / "c.jpg", 40, 20)
    save_image(tmp_path / "images" / "other" / "d.jpg", 10, 10)
    labels = tmp_path / "labels" / "train"
    (labels / "deep").mkdir(parents=True)
    (labels / "b.txt").write_text("0 0.5 0.5 0.5 0.1\n2 0.1 0.2 0.5 0.2 0.3 0.4\n")
    (labels / "deep" / "a.txt").write_text("2 0.5 0.5 1 1\n")
    (tmp_path / "val.txt").write_text("./images/other/d.jpg\n")
    return tmp_path


@pytest.mark.parametrize("place", [".", "data.yaml"])
def test_yolo_boxes_and_polygons_in_pixels_of_the_upright_image(yolo: Path, place: str) -> None:
    source = read_source("yolo", yolo / place, "train")
    assert source.image_dir == yolo / "images" / "train"
    images = {i["id"]: (i["file_name"], i["width"], i["height"]) for i in source.content["images"]}
    assert list(images) == [1, 2, 3]
    found = [
        (Path(images[a["image_id"]][0]).name, a["category_id"], a["bbox"])
        for a in source.content["annotations"]
    ]
    assert sorted(found) == [
        ("a.jpg", 2, [0, 0, 20, 40]),
        ("b.jpg", 0, [10, 9, 20, 2]),
        ("b.jpg", 2, [4, 4, 16, 4]),
    ]
    assert sorted(Path(name).name for name, _, _ in images.values()) == ["a.jpg", "b.jpg", "c.jpg"]
    assert [(c["id"], c["name"]) for c in source.content["categories"]] == [(0, "cat"), (2, "dog")]


@pytest.mark.parametrize("size", [(40, 30), (30, 30)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_yolo_boxes_stay_on_their_objects_at_every_exif_orientation(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    """Pillow's own turning tells what is upright; the object is at 2, 3 to 12, 9."""
    upright = Image.new("RGB", size)
    upright.paste((255, 0, 0), (2, 3, 12, 9))
    stored = next(
        turned
        for turned in [upright, *(upright.transpose(way) for way in Image.Transpose)]
        if np.array_equal(shown(turned, orientation), np.asarray(upright))
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    stored.save(tmp_path / "images" / "a.png", exif=exif)
    (tmp_path / "labels").mkdir()
    values = (7 / size[0], 6 / size[1], 10 / size[0], 6 / size[1])
    (tmp_path / "labels" / "a.txt").write_text(f"0 {' '.join(map(str, values))}\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x]\n")
    source = read_source("yolo", tmp_path, "train")
    for number in range(2):
        index = CocoIndex.from_source(source, need_boxes=True)
        image = CocoDetection(index, PLAIN).read_image(1)
        assert image is not None
        red = np.asarray(image)[:, :, 0] == 255
        x0, y0, x1, y1 = index.boxes[0].round().astype(int).tolist()
        assert red[y0:y1, x0:x1].all()
        assert red.sum() == (x1 - x0) * (y1 - y0) == 60
        convert({"train": source}, "yolo", tmp_path / f"again{number}", copy=True)
        source = read_source("yolo", tmp_path / f"again{number}", "train")


def shown(image: Image.Image, orientation: int) -> NDArray[np.uint8]:
    """Return the pixels that Pillow shows of a file that is said to lie so."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    return np.asarray(ImageOps.exif_transpose(Image.open(buffer)))


def test_yolo_files_as_windows_has_them(yolo: Path) -> None:
    text = (yolo / "data.yaml").read_text().replace("images/train", "images\\train")
    (yolo / "data.yaml").write_text("\ufeff" + text.replace("\n", "\r\n"), newline="")
    label = yolo / "labels" / "train" / "b.txt"
    label.write_text("\ufeff" + label.read_text().replace("\n", "\r\n"), newline="")
    (yolo / "val.txt").write_text("\ufeff.\\images\\other\\d.jpg\r\n", newline="")
    source = read_source("yolo", yolo, "train")
    assert len(source.content["annotations"]) == 3
    assert found(source).keys() == {"long_lines"}
    assert read_source("yolo", yolo, "val").content["images"][0]["file_name"] == "d.jpg"


def test_yolo_without_any_label_file_says_where_they_would_be(yolo: Path) -> None:
    (yolo / "labels").rename(yolo / "annotations")
    source = read_source("yolo", yolo, "train")
    ((place, detail),) = found(source)["odd_layout"]
    assert place == yolo.name
    assert detail.startswith("no label files; the first would be ")
    with pytest.raises(DataError, match=rf"first would be {yolo / 'labels'}"):
        CocoIndex.from_source(source, need_boxes=True)


def test_yolo_labels_without_an_image_are_named(yolo: Path) -> None:
    """Not those of an image of another split, nor lists of classes."""
    labels = yolo / "labels" / "train"
    for name in ("moving.heic", "new.SVG"):
        (yolo / "images" / "train" / name).write_bytes(b"none")
        (labels / name).with_suffix(".txt").write_text("0 0.5 0.5 0.1 0.1\n")
    for name in ("moving.json", "moving.xml", "gone.json"):  # of other tools
        (yolo / "images" / "train" / name).write_bytes(b"none")
    (labels / "classes.txt").write_text("cat\ndog\n")
    (labels / "empty.txt").write_text("")
    (labels / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (labels / "b.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (yolo / "val.txt").write_text("images/train/b.jpg\n")
    unread = "there is {!r}, of a kind that is not read"
    for split in ("train", "val"):
        assert found(read_source("yolo", yolo, split)) == {
            "label_without_image": [
                (str(labels / "gone.txt"), ""),
                (str(labels / "moving.txt"), unread.format("moving.heic")),
                (str(labels / "new.txt"), unread.format("new.SVG")),
            ]
        }


@pytest.mark.skipif(sys.platform != "linux", reason="names differ by case")
def test_yolo_labels_in_another_spelling_are_matched_and_reported(tmp_path: Path) -> None:
    """Case and accents change on the way through Windows or a Mac."""
    composed, split = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for stem in ("IMG_1", composed, "b", "x", "X"):
        save_image(tmp_path / "images" / f"{stem}.png", 8, 8)
    (tmp_path / "labels").mkdir()
    for label in ("img_1.txt", f"{split}.txt", "b.TXT", "x.txt"):
        (tmp_path / "labels" / label).write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    source = read_source("yolo", tmp_path, "train")
    name = {image["id"]: image["file_name"] for image in source.content["images"]}
    labelled = {name[a["image_id"]] for a in source.content["annotations"]}
    assert labelled == {"IMG_1.png", f"{composed}.png", "b.png", "x.png"}
    assert found(source) == {
        "matched_name": [
            (f"{split}.txt", f"has the labels of {composed!r}"),
            ("img_1.txt", "has the labels of 'IMG_1'"),
        ]
    }


@pytest.mark.skipif(sys.platform != "linux", reason="names differ by case")
def test_yolo_labels_of_another_splits_image_stay_its_own(tmp_path: Path) -> None:
    for stem in ("img_1", "IMG_1", "b", "B"):
        save_image(tmp_path / "images" / f"{stem}.png", 8, 8)
    (tmp_path / "labels").mkdir()
    for label in ("IMG_1.txt", "b.TXT"):  # the second may be of either image
        (tmp_path / "labels" / label).write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "train.txt").write_text("images/img_1.png\nimages/B.png\n")
    (tmp_path / "val.txt").write_text("images/IMG_1.png\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat]\n")
    assert read_source("yolo", tmp_path, "train").content["annotations"] == []
    assert len(read_source("yolo", tmp_path, "val").content["annotations"]) == 1


def test_yolo_labels_beside_images_are_no_images(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.txt", "gone.txt"):
        (tmp_path / name).write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text("train: .\nnames: [cat]\n")
    assert found(read_source("yolo", tmp_path, "train")) == {
        "label_without_image": [(str(tmp_path / "gone.txt"), "")]
    }


def test_yolo_lists_of_names(yolo: Path) -> None:
    source = read_source("yolo", yolo, "val")
    assert source.image_dir == yolo / "images" / "other"
    assert source.content["images"] == [{"id": 1, "file_name": "d.jpg", "height": 10, "width": 10}]
    assert source.content["annotations"] == []


def test_yolo_lines_that_are_no_box_are_named(yolo: Path) -> None:
    path = yolo / "labels" / "train" / "b.txt"
    path.write_text(
        "0 0.5 0.5 0.5 0.1\n\ncat 1 2 3 4\n0,1,1,1,1\n0 0.5 0.5\n1.5 0 0 1 1\n0 1 1 1 1 1\n"
        "0 1 1 1 1 7\n"
    )
    wrong = found(read_source("yolo", yolo, "train"))["unreadable_annotation"]
    assert wrong == [
        (f"{path}:3", "'cat' is not a number"),
        (f"{path}:4", "'0,1,1,1,1' is not a number"),
        (f"{path}:5", "2 numbers after the class are neither a box nor corners"),
        (f"{path}:6", "class index 1.5 is not a whole number"),
        (f"{path}:7", "a fifth number after the class: a confidence? Remove it to use the box"),
        (f"{path}:8", "5 numbers after the class are neither a box nor corners"),
    ]


def test_yolo_key_points_follow_the_box(yolo: Path) -> None:
    with (yolo / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 2]\n")
    (yolo / "labels" / "train" / "b.txt").write_text("0 0.5 0.5 0.5 0.1 0.9 0.9 0.1 0.1\n")
    assert [10, 9, 20, 2] in boxes(read_source("yolo", yolo, "train"))


def test_yolo_boxes_of_unreadable_images_are_left_out(yolo: Path) -> None:
    (yolo / "images" / "train" / "b.jpg").write_bytes(b"no image")
    source = read_source("yolo", yolo, "train")
    assert boxes(source) == [[0, 0, 20, 40]]
    assert len(source.content["images"]) == 3
    (labels,) = found(source)["unreadable_annotation"]
    assert labels == (str(yolo / "labels" / "train" / "b.txt"), "its image cannot be read")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\n", "`names` must be a list"),
        ("names: []\ntrain: images/train\n", "`names` must be a list"),
        ("names: [a]\nval: x\n", "`train` must name .* Splits there: val"),
        ("names: [a]\ntrain: nowhere\n", "`train` names 'nowhere'"),
        ("names: [a]\ntrain: labels\n", "there are no images under `train`"),
        ("names: [a]\ntrain: raw\n", r"kinds that are not read: 2 \.heic\."),
        (f"names: [a]\ntrain: {'x' * 300}\n", "which is not under"),
        (f"names: [a]\npath: {'x' * 300}\ntrain: nowhere\n", "which is not under"),
        ("[" * 3000, "data.yaml: not YAML"),
        ("names: [a\ntrain: b: c\n", r"data.yaml:2: not YAML"),
        ("- 1\n", "must hold `names`, `train` and `val`"),
        ("\x00", "data.yaml: not YAML"),
    ],
)
def test_yolo_descriptions_are_refused_in_one_line(yolo: Path, text: str, message: str) -> None:
    (yolo / "data.yaml").write_text(text)
    (yolo / "raw").mkdir()
    for name in "ab":
        (yolo / "raw" / f"{name}.heic").touch()
    with pytest.raises(DataError, match=message) as caught:
        read_source("yolo", yolo, "train")
    assert "\n" not in str(caught.value)


def test_folders_of_another_format_are_refused(voc: Path, yolo: Path) -> None:
    (yolo / "data.yaml").unlink()
    with pytest.raises(DataError, match="there is no data.yaml"):
        read_source("yolo", yolo, "train")
    with pytest.raises(DataError, match="there is no Annotations/"):
        read_source("voc", voc / "JPEGImages", "train")
    with pytest.raises(DataError, match="no such folder of images"):
        read_source("coco", voc, "train")
