"""Folders as tools export them are read from `data_path` alone, and say as what."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import DataConfig
from datasets.build import Split, load_index, read_split
from datasets.formats.registry import read_source
from datasets.index import CocoIndex
from main import main
from tests.unit.datasets.formats.exports import (
    KETTLE,
    LINES,
    MUG,
    NAMES,
    TRUTH,
    coco_content,
    save_images,
    voc_object,
    voc_text,
    write_coco,
    write_voc,
    write_yaml,
    write_yolo,
)
from util.errors import DataError

Shared = Callable[[str], Path]


def load(place: Path, split: Split = "train", **options: str) -> CocoIndex:
    options = {"voc_corners": "edges", "data_path": str(place), **options}
    return load_index(DataConfig(**options), split)  # type: ignore[arg-type]


def boxes(index: CocoIndex) -> set[tuple[str | float, ...]]:
    found = index.annotations
    pairs = zip(found.labels.tolist(), found.xywh.tolist(), strict=True)
    return {(index.classes.names[label], *(round(v, 3) for v in box)) for label, box in pairs}


def notes(index: CocoIndex) -> dict[str, str]:
    return {finding.kind: finding.text for finding in index.findings}


def roboflow_coco(d: Path) -> None:
    for split in ("train", "valid"):
        write_coco(d / split / "_annotations.coco.json", d / split)


def cvat_coco(d: Path) -> None:
    for split in ("train", "val"):
        file = d / "annotations" / f"instances_{split}.json"
        write_coco(file, d / "images" / split, names=lambda path: path.name)


def coco_folders(d: Path) -> None:
    for split in ("Train", "Validation"):
        write_coco(d / split / "labels.json", d / split / "data")


def coco_beside_other_data(d: Path) -> None:
    for split in ("train", "val"):
        write_coco(d / "annotations" / f"{split}.json", d / "BCCD" / "JPEGImages")


def coco_names_with_folders(d: Path) -> None:
    for split in ("train", "val"):
        write_coco(
            d / f"{split}.json", d / split, names=lambda path: f"{path.parent.name}/{path.name}"
        )


def voc_beside(d: Path) -> None:
    for split in ("train", "valid"):
        write_voc(d / split, d / split)


def voc_subfolders(d: Path) -> None:
    for first, sub in ((1, "kitchen"), (4, "garden")):
        write_voc(d / "Annotations" / sub, d / "JPEGImages" / sub, first=first)
    lists = d / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("kitchen/shot_1\nkitchen/shot_2.png\nshot_3\n")
    (lists / "val.txt").write_text("garden\\shot_4\ngarden/shot_5\ngarden/shot_6\n")


def voc_kaggle(d: Path) -> None:
    write_voc(d / "annotations" / "train", d / "images")
    write_voc(d / "annotations" / "val", d / "images", first=4)


def voc_jfif(d: Path) -> None:
    for split in ("train", "val"):
        write_voc(d / split, d / split, suffix=".jfif")


def yolo_classes(d: Path) -> None:
    for split in ("train", "val"):
        write_yolo(d / "images" / split, d / "labels" / split)
    (d / "classes.txt").write_text("\ufeffkettle\r\nmug\r\n", newline="")
    (d / "notes.json").write_text('{"categories": [], "info": {}}')


def yolo_lists(d: Path) -> None:
    """Lists of the splits' images, and nothing that names the lists."""
    for first, split in ((1, "train"), (4, "val")):
        write_yolo(d / "images", d / "labels", first=first)
        names = [f"data/images/shot_{k}.png\n" for k in range(first, first + 3)]
        (d / f"{split}.txt").write_text("".join(names))
    (d / "classes.txt").write_text("kettle\nmug\n")


def yolo_darknet(d: Path) -> None:
    folder = d / "obj_train_data"
    for first, split in ((1, "train"), (4, "valid")):
        write_yolo(folder, folder, first=first)
        names = [f"data/obj_train_data/shot_{k}.png\n" for k in range(first, first + 3)]
        (d / f"{split}.txt").write_text("".join(names))
    (d / "obj.names").write_text("kettle\nmug\n")
    (d / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"
    )


def roboflow_darknet(d: Path) -> None:
    for split in ("train", "valid"):
        write_yolo(d / split, d / split)
        (d / split / "_darknet.labels").write_text("kettle\nmug\n")


def yolo_above(d: Path) -> None:
    """A set inside a folder called images, with labels beside the images."""
    root = d / "images" / "project_7"
    for split in ("train", "val"):
        write_yolo(root / split, root / split)
    write_yaml(root, train="train", val="val")


def yolo_valid(d: Path) -> None:
    for split in ("train", "valid"):
        write_yolo(d / split / "images", d / split / "labels")
    write_yaml(d, train="../train/images", valid="../valid/images")


def yolo_capitals(d: Path) -> None:
    for split in ("train", "val"):
        write_yolo(d / split / "Images", d / split / "Labels")
    write_yaml(d, train="train/Images", val="val/Images")


def yolo_elsewhere(d: Path) -> None:
    """Paths of another machine, in a list too."""
    for split in ("train", "val"):
        write_yolo(d / "images" / split, d / "labels" / split)
    write_yaml(d, path="/home/alice/set", train="/home/alice/set/images/train", val="val.txt")
    names = [f"C:\\set\\images\\val\\shot_{k}.png\n" for k in (1, 2, 3)]
    (d / "val.txt").write_text("".join(names))


def yolo_mac(d: Path) -> None:
    """A Mac's ._ files beside all others, and the caches of other tools."""
    for split in ("train", "val"):
        write_yolo(d / split / "images", d / split / "labels")
        for path in [*(d / split / "images").iterdir(), *(d / split / "labels").iterdir()]:
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(99))
        (d / split / "images" / ".DS_Store").write_bytes(bytes(9))
        (d / split / "labels.cache").write_bytes(b"\x93NUMPY")
    write_yaml(d, train="train/images", val="val/images")


def yolo_suffixes(d: Path) -> None:
    """Images of suffixes that few tools write, beside usual ones."""
    for split in ("train", "val"):
        write_yolo(d / split / "images", d / split / "labels", suffix=".jfif", first=1)
        for path in sorted((d / split / "images").iterdir())[1:]:
            path.unlink()
        write_yolo(d / split / "images", d / split / "labels", suffix=".ppm", first=2)
        (d / split / "images" / "shot_4.ppm").unlink()
        (d / split / "labels" / "shot_4.txt").unlink()
    write_yaml(d, train="train/images", val="val/images")


def in_capitals(d: Path, suffix: str) -> None:
    """Give most files of a suffix the same in capitals, as programs on Windows do."""
    for path in sorted(d.rglob(f"*{suffix}"))[1:]:
        path.rename(path.with_suffix(suffix.upper()))


def yolo_labels_in_capitals(d: Path) -> None:
    yolo_valid(d)
    in_capitals(d, ".txt")


def voc_in_capitals(d: Path) -> None:
    voc_beside(d)
    in_capitals(d, ".xml")


def labelme_in_capitals(d: Path) -> None:
    labelme(d)
    in_capitals(d, ".json")


def with_copies(d: Path) -> None:
    """Put what Jupyter, a disk station and an archive of a Mac leave behind beside all files."""
    for path in [path for path in d.rglob("*") if path.is_file() and path.suffix != ".yaml"]:
        for place in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            (path.parent / place).mkdir(exist_ok=True)
            copy = path.parent / place / f"{path.stem}-checkpoint{path.suffix}"
            copy.write_bytes(path.read_bytes())


def yolo_with_copies(d: Path) -> None:
    yolo_valid(d)
    with_copies(d)


def voc_with_copies(d: Path) -> None:
    voc_beside(d)
    with_copies(d)


def labelme(d: Path) -> None:
    for split in ("train", "val"):
        for path in save_images(d / split):
            (x, y, w, h), (left, top, width, height) = KETTLE, MUG
            middle, low = left + width / 2, top + height
            shapes = [
                {"label": "kettle", "points": [[x + w, y + h], [x, y]], "shape_type": "rectangle"},
                {"label": "mug", "points": [[left, top], [left + width, top], [middle, low]]},
            ]
            content = {"imagePath": f"..\\{split}\\{path.name}", "shapes": shapes,
                       "imageHeight": 80, "imageWidth": 100, "imageData": None}  # fmt: skip
            path.with_suffix(".json").write_text(json.dumps(content))


LAYOUTS: dict[Callable[[Path], None], str] = {
    roboflow_coco: "coco, by train/_annotations.coco.json",
    cvat_coco: "coco, by annotations/instances_train.json",
    coco_folders: "coco, by Train/labels.json",
    coco_beside_other_data: "coco, by annotations/train.json",
    coco_names_with_folders: "coco, by train.json",
    voc_beside: "voc, by XML files in train/",
    voc_subfolders: "voc, by XML files in Annotations/",
    voc_kaggle: "voc, by XML files in annotations/",
    voc_jfif: "voc, by XML files in train/",
    yolo_classes: "yolo, by classes.txt",
    yolo_lists: "yolo, by classes.txt",
    yolo_darknet: "yolo, by obj.data",
    roboflow_darknet: "yolo, by train/_darknet.labels",
    yolo_above: "yolo, by images/project_7/: data.yaml",
    yolo_valid: "yolo, by data.yaml",
    yolo_capitals: "yolo, by data.yaml",
    yolo_elsewhere: "yolo, by data.yaml",
    yolo_mac: "yolo, by data.yaml",
    yolo_suffixes: "yolo, by data.yaml",
    labelme: "labelme, by train/shot_",
    yolo_labels_in_capitals: "yolo, by data.yaml",
    voc_in_capitals: "voc, by XML files in train/",
    labelme_in_capitals: "labelme, by train/shot_",
    yolo_with_copies: "yolo, by data.yaml",
    voc_with_copies: "voc, by XML files in train/",
}


@pytest.mark.parametrize("name", ["data/{}.png", "{}/images/1.png", "data/{}/1.png"])
def test_a_listed_name_that_is_too_long_for_a_file_is_one_more_missing_image(
    name: str, tmp_path: Path
) -> None:
    yolo_darknet(tmp_path)
    file = tmp_path / "train.txt"
    file.write_text(f"{name.format('9' * 5000)}\n{file.read_text()}")
    source = read_split(DataConfig(data_path=str(tmp_path)), "train")
    assert len(source.content["images"]) == 4
    code = main(["check", "--data_path", str(tmp_path), "--splits", "train", "--num_workers", "0"])
    assert code == 1  # it lists the missing image


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_a_layout_is_read_from_its_folder_alone(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    for split in ("train", "val"):
        index = load(tmp_path, split)
        assert len(index) == 3
        assert len(index.boxes) == 6
        assert boxes(index) == TRUTH
        assert index.classes.names == NAMES
        assert LAYOUTS[write] in notes(index)["detected_format"]
        assert notes(index).keys() <= {"detected_format", "odd_layout"}
        source = read_split(DataConfig(data_path=str(tmp_path), voc_corners="edges"), split)
        assert len(source.content["annotations"]) == 6


def test_a_corner_too_large_for_a_number_is_reported_with_its_file(tmp_path: Path) -> None:
    labelme(tmp_path)
    path = next((tmp_path / "train").glob("*.json"))
    content = json.loads(path.read_text())
    content["shapes"][0]["points"][0][0] = 10**400
    path.write_text(json.dumps(content))
    source = read_source("labelme", tmp_path, "train")
    ((name, detail),) = source.findings["unreadable_annotation"]
    assert Path(name).name == path.name
    assert detail == "'rectangle' has no box"
    assert len(source.content["annotations"]) == 5  # of six


def test_images_inside_of_labelme_files_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    """As labelme writes them by default; shapes may hold masks in the same way."""
    labelme(tmp_path)
    files = sorted((tmp_path / "train").glob("*.json"))
    content = json.loads(files[0].read_text())
    content["imageData"] = content["shapes"][0]["mask"] = "A" * 100_000
    for number in range(30):
        (tmp_path / "train" / f"more_{number}.json").write_text(json.dumps(content))
    tracemalloc.start()
    source = read_source("labelme", tmp_path, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source.content["annotations"]) == 2 * (len(files) + 30)
    assert peak < 30 * 100_000


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), junk=st.binary(max_size=8))
def test_any_bytes_in_an_export_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, junk: bytes
) -> None:
    place = tmp_path_factory.mktemp("set")
    data.draw(st.sampled_from([*LAYOUTS]))(place)
    file = data.draw(st.sampled_from(sorted(p for p in place.rglob("*") if p.is_file())))
    raw = file.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = start + data.draw(st.sampled_from([0, 1, 5, 10**9]))
    file.write_bytes(raw[:start] + junk + raw[end:])
    try:
        found = "".join(notes(load(place)).values())
    except DataError as error:
        found = str(error)
    assert "\n" not in found


def test_chess_as_exported(shared: Shared) -> None:
    place = shared("datasets/chess")
    index = load(place)
    assert (len(index), len(load(place, "val")), len(load(place, val_split="test"))) == (
        202,
        58,
        202,
    )
    assert len(index.classes.names) == 13
    assert "pieces" not in index.classes.names
    assert len(index.boxes) == 2108


def test_a_category_that_only_holds_the_others_is_no_class(tmp_path: Path) -> None:
    content = coco_content([path.name for path in save_images(tmp_path / "train")])
    root = {"id": 0, "name": "kitchen", "supercategory": "none"}
    content["categories"] = [root] + [
        {**category, "supercategory": "kitchen"} for category in content["categories"]
    ]
    file = tmp_path / "train" / "_annotations.coco.json"
    file.write_text(json.dumps(content))
    index = load(tmp_path)
    assert index.classes.names == NAMES
    assert "categories[0]' name 'kitchen'" in notes(index)["root_category"]
    content["annotations"][0]["category_id"] = 0  # it has a box, so it is a class
    file.write_text(json.dumps(content))
    assert load(tmp_path).classes.names == ("kitchen", *NAMES)


def test_split_names_and_locations_are_reported(tmp_path: Path) -> None:
    yolo_valid(tmp_path)
    note = notes(load(tmp_path, "val"))["odd_layout"]
    assert "`val` is `valid` there" in note
    assert "'../valid/images' is read from valid/images" in note
    note = notes(load(tmp_path, "val"))["detected_format"]
    assert f"('{tmp_path.name}' yolo, by data.yaml; images of val in valid/images)" in note
    roboflow_coco(tmp_path / "coco")
    assert "images of val in valid)" in notes(load(tmp_path / "coco", "val"))["detected_format"]
    yolo_elsewhere(tmp_path / "list")
    note = notes(load(tmp_path / "list", "val"))["odd_layout"]
    assert "names in val.txt are read without their first 2 parts" in note


def test_a_name_that_no_file_can_have_is_reported(tmp_path: Path) -> None:
    yolo_elsewhere(tmp_path)
    with (tmp_path / "val.txt").open("a") as file:
        file.write("images/v\0al/a.png\n" + "x" * 5000 + ".png\n")
    index = load(tmp_path, "val")
    assert len(index.boxes) == 6
    assert notes(index)["missing_image"].startswith("missing images: 2 of 5")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train/_annotations.createml.json", "[]", "looks like Create ML JSON"),
        ("all.json", '[{"image": "a", "annotations": [{"coordinates": {}}]}]', "Create ML JSON"),
        ("set.jsonl", "{}", "set.jsonl looks like JSON lines, which is not read. Export"),
        ("train/_annotations.csv", "a,b", r"looks like a table \(CSV\)"),
        ("a.json", "{}", "no data of a known format"),
        ("ls.json", '[{"annotations": [{"result": [{"from_name": "a", "to_name": "b"}]}]}]',
         "ls.json looks like Label Studio's own JSON, which is not read. Export"),
        ("train/via.json", '{"a.png9": {"regions": [{"shape_attributes": {}}]}}',
         r"train/via.json looks like VGG Image Annotator \(VIA\) JSON"),
        ("ds0/ann/a.png.json", '{"objects": [{"classTitle": "mug"}]}',
         "ds0/ann/a.png.json looks like Supervisely JSON"),
        ("samples.json", '{"samples": [{"ground_truth": {"_cls": "Detections"}}]}', "FiftyOne's"),
        ("annotations/default.json", '{"categories": {}, "items": [{"label_id": 0}]}', "Datumaro"),
        ("releases/latest/annotations/a.json", '{"item": {}, "annotations": [{"bounding_box": 1}]}',
         "releases/latest/annotations/a.json looks like V7 Darwin JSON"),
        ("labels/det_train.json", '[{"name": "a", "labels": [{"box2d": {}}]}]', "BDD100K JSON"),
        ("annotations.xml", "<?xml version='1.0'?>\n<annotations><version>1.1</version>"
         "<image name='a.png'/></annotations>", "annotations.xml looks like CVAT's own XML"),
        ("annotation_train.odgt", "{}", "JSON lines"),
        ("labels/a.txt", "0 0.5 0.5 0.1 0.1\n", "labels/a.txt looks like a label file of YOLO, but "
         "nothing names the classes. List their names in classes.txt"),
        ("label_2/000001.txt", "Car 0.00 0 -1.58 587.0 173.3 614.1 200.1 1.65 1.67 3.64 -0.65 1.71 "
         "46.70 -1.59\n", "label_2/000001.txt looks like labels of KITTI, which is not read"),
        ("labelTxt/P0.txt", "2753 2408 2861 2385 2888 2468 2805 2502 plane 0\n", "labels of DOTA"),
        ("labelTxt/P1.txt", "imagesource:GoogleEarth\ngsd:0.1\n", "looks like labels of DOTA"),
        ("annotations/0.txt", "684,8,273,116,0,0,0,0\n", "a table of VisDrone or MOT"),
        ("gt/gt.txt", "1,1,912,484,97,109,0,7,1\n", "gt/gt.txt looks like a table of VisDrone or"),
        ("README.txt", "0 is what nobody reads", "no data of a known format"),
        ("ann.json", json.dumps(coco_content(["a.png"])), "there is one COCO-format file, "
         r"ann.json, and nothing says .* `train_annotations .*/set/ann.json` "
         "`train_images .*/set`"),
    ],
)  # fmt: skip
def test_formats_that_are_not_read_are_named(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    file = tmp_path / "set" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_several_formats_or_sets_are_not_guessed_between(tmp_path: Path) -> None:
    voc_kaggle(tmp_path / "one")
    write_yaml(tmp_path / "one", train="images", val="images")
    with pytest.raises(
        DataError, match=r"several formats: voc \(XML.*\), yolo \(data.yaml\).* `data_format`"
    ):
        load(tmp_path / "one")
    assert boxes(load(tmp_path / "one", data_format="voc")) == TRUTH
    yolo_valid(tmp_path / "two")
    with pytest.raises(DataError, match=r"several data sets: one \(voc, yolo\), two \(yolo\)"):
        load(tmp_path)
    with pytest.raises(DataError, match="no such folder of data"):
        load(tmp_path / "three")


def test_a_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    yolo_classes(tmp_path / "yolo")
    voc_beside(tmp_path / "voc")
    for place in (tmp_path / "yolo", tmp_path / "voc"):
        with pytest.raises(DataError, match=r"split 'test'.*Splits there: train, val"):
            load(place, train_split="test")


def test_yolo_without_splits_is_reported(tmp_path: Path) -> None:
    write_yolo(tmp_path / "images", tmp_path / "labels")
    (tmp_path / "classes.txt").write_text("kettle\nmug\n")
    index = load(tmp_path, "val")
    assert boxes(index) == TRUTH
    assert "every split is all images of images/, train as val" in notes(index)["odd_layout"]


def test_xml_in_other_encodings_and_with_a_stray_ampersand(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    write_voc(folder, folder)
    (folder / "shot_1.xml").write_text(voc_text(voc_object("pot & kettle", KETTLE)))
    text = voc_text(voc_object("\u6c34\u58f6", KETTLE))
    declared = f'<?xml version="1.0" encoding="gbk"?>\n{text}'
    (folder / "shot_2.xml").write_bytes(declared.encode("gbk"))
    (folder / "shot_3.xml").write_bytes(declared.replace("gbk", "utf-16").encode("utf-16"))
    index = load(tmp_path)
    assert index.classes.names == ("pot & kettle", "\u6c34\u58f6")
    assert len(index.boxes) == 3
    assert "'shot_1.xml' with 1 `&` taken as text" in notes(index)["repaired_annotation"]
    assert "'shot_2.xml' in the encoding gbk" in notes(index)["repaired_annotation"]

    (folder / "shot_2.xml").write_bytes(text.encode("gbk"))  # which it does not declare
    index = load(tmp_path)
    assert len(index.boxes) == 2
    assert "as gb18030 it says '\u6c34\u58f6'" in notes(index)["unreadable_annotation"]


def test_json_in_another_encoding_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path / "train" / "a.json", tmp_path / "train")
    content = coco_content([path.name for path in save_images(tmp_path / "train")])
    content["categories"][0]["name"] = "\u6c34\u58f6"
    text = json.dumps(content, ensure_ascii=False)
    file = tmp_path / "train" / "a.json"
    file.write_bytes(text.encode("gbk"))
    with pytest.raises(
        DataError, match=r"not in UTF-8 \(line 1\): as gb18030 it says '\u6c34\u58f6'"
    ):
        load(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(tmp_path).classes.names == ("\u6c34\u58f6", "mug")


def test_voc_shapes_without_a_box_become_the_box_around_them(tmp_path: Path) -> None:
    x, y, w, h = KETTLE
    corners = {"x1": x, "y1": y + h, "x2": x + w, "y2": y, "x3": x, "y3": y}
    numbered = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners.items())
    points = "".join(f"<pt><x>{a}</x><y>{b}</y></pt>" for a, b in ((60, 10), (80, 10), (70, 40)))
    turned = "<robndbox><cx>50</cx><cy>40</cy><w>20</w><h>10</h><angle>1.5707963</angle></robndbox>"
    bodies = [
        ("kettle", f"<polygon>{numbered}</polygon>"),
        ("mug", f"<polygon>{points}</polygon>"),
        ("pan", turned),
    ]
    write_voc(tmp_path / "train", tmp_path / "train")
    (tmp_path / "train" / "shot_1.xml").write_text(
        voc_text("".join(f"<object><name>{name}</name>{body}</object>" for name, body in bodies))
    )
    index = load(tmp_path)
    assert boxes(index) == {*TRUTH, ("pan", 45, 30, 10, 20)}
    assert notes(index)["shape_bbox"].startswith("objects without a box: 3 ('shot_1.xml'")


def test_voc_width_and_height_in_the_place_of_corners(tmp_path: Path) -> None:
    body = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{w}</xmax>"
        f"<ymax>{h}</ymax></bndbox></object>"
        for name, (x, y, w, h) in zip(NAMES, (KETTLE, MUG), strict=True)
    )
    for path in save_images(tmp_path / "train"):
        path.with_suffix(".xml").write_text(voc_text(body))
    index = load(tmp_path)
    assert "3 of 6 boxes have xmax or ymax below xmin or ymin" in notes(index)["size_corners"]
    assert "set `voc_corners` to size" in notes(index)["size_corners"]
    index = load(tmp_path, voc_corners="size")
    assert boxes(index) == TRUTH
    assert "size_corners" not in notes(index)


def test_labels_beside_images_count_where_the_labels_folder_has_none(tmp_path: Path) -> None:
    """The folder is chosen by what it holds; with labels in both, `labels` counts."""
    folder = tmp_path / "images"
    write_yolo(folder, folder)
    write_yaml(tmp_path, train="images", val="images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "classes.txt").write_text("kettle\nmug\n")
    assert boxes(load(tmp_path)) == TRUTH
    (tmp_path / "labels" / "shot_2.txt").write_text(LINES.splitlines()[0])
    assert len(load(tmp_path).boxes) == 1
