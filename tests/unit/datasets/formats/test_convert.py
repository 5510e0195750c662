"""Conversion between formats: the same training targets, whatever the data is kept as."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.dataset import CocoDetection
from datasets.formats.coco import read_coco_file
from datasets.formats.convert import convert
from datasets.formats.registry import Source, read_source
from datasets.index import CocoIndex
from datasets.transforms import EvalTransform
from main import main
from util.errors import DataError

Content = dict[str, Any]
Write = Callable[[Content], tuple[Path, Path]]
Targets = dict[str, list[tuple[str, list[float]]]]
PLAIN = EvalTransform(eval_scale=32, max_size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
FORMATS = ("coco", "voc", "yolo")


def targets(source: Source) -> Targets:
    """Return what a model would be trained on: class names and boxes, by name of the image."""
    index = CocoIndex.from_source(source, need_boxes=True)
    dataset = CocoDetection(index, PLAIN)
    found: Targets = {}
    for i, name in enumerate(index.images.file_names):
        item = dataset[i]
        assert isinstance(item, tuple)
        labels, boxes = item[1]["labels"].tolist(), item[1]["boxes"].tolist()
        pairs = [(dataset.classes.names[k], box) for k, box in zip(labels, boxes, strict=True)]
        found[Path(name).stem] = sorted(pairs)
    return found


def chain(source: Source, formats: tuple[str, ...], folder: Path) -> Source:
    """Convert again and again, each time from what was written before."""
    for number, target in enumerate(formats):
        out = folder / f"{number}_{target}"
        convert({"train": source}, target, out, copy=False)
        source = read_source(target, out, "train")
    return source


def test_every_size_that_is_written_is_that_of_the_file(
    content: Content, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.checks.images._SIZES_CHECKED", 1)  # the first, which is right
    json_path, folder = write(content)
    content["images"][2]["width"] = 41
    json_path.write_text(json.dumps(content))
    source = read_coco_file(json_path, folder)
    lines = convert({"train": source}, "coco", tmp_path / "out", copy=False)
    assert any("1 of 3 checked ('2.png' stated 41 x 30, is 40 x 30)" in line for line in lines)
    written = read_source("coco", tmp_path / "out", "train").content["images"]
    assert [(image["width"], image["height"]) for image in written] == [(40, 30)] * 3


@pytest.mark.long
def test_bccd_trains_alike_in_every_format(shared: Callable[[str], Path], tmp_path: Path) -> None:
    source = read_source("voc", shared("datasets/bccd") / "BCCD", "val")
    del source.content["images"][12:]  # decoding the rest shows nothing new
    wanted = {image["id"] for image in source.content["images"]}
    source.content["annotations"] = [
        a for a in source.content["annotations"] if a["image_id"] in wanted
    ]
    expected = targets(source)
    assert len(expected) == 12
    assert sum(map(len, expected.values())) > 100
    for formats in (("coco",), ("voc",), ("yolo",), ("yolo", "coco", "voc", "yolo")):
        assert targets(chain(source, formats, tmp_path / "-".join(formats))) == expected


@st.composite
def data_sets(draw: st.DrawFn) -> Content:
    """Draw images of several sizes with sound boxes of whole pixels or six decimals."""
    ids = draw(st.lists(st.integers(0, 90), min_size=1, max_size=4, unique=True))
    names = [f"class {number} & <co>" for number in sorted(ids)]
    images: list[Content] = []
    annotations: list[Content] = []
    for number in range(draw(st.integers(1, 3))):
        width, height = draw(st.integers(8, 60)), draw(st.integers(8, 60))
        images.append(
            {"id": 7 * number, "file_name": f"p{number}.png", "width": width, "height": height}
        )
        for _ in range(draw(st.integers(0 if number else 1, 3))):
            x, y = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
            w, h = draw(st.integers(1, width - x)), draw(st.integers(1, height - y))
            shift = draw(st.sampled_from([0, 0.5, 0.000001, 0.123457]))
            box = [x + shift, y + shift, w - shift, h - shift]
            annotations.append(
                {
                    "id": len(annotations), "image_id": 7 * number, "bbox": box,
                    "category_id": draw(st.sampled_from(ids)),
                }
            )  # fmt: skip
    categories = [{"id": i, "name": n} for i, n in zip(sorted(ids), names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=data_sets(), formats=st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3))
def test_generated_sets_train_alike_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, content: Content, formats: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("set")
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
    source = Source(content, folder, folder)
    written = chain(source, tuple(formats), folder / "out")
    ours, theirs = targets(source), targets(written)
    assert ours == theirs


def test_coco_keeps_ids_and_areas(content: Content, write: Write, tmp_path: Path) -> None:
    json_path, folder = write(content)
    convert({"val": read_coco_file(json_path, folder)}, "coco",
            tmp_path / "out", copy=True)  # fmt: skip
    written = read_source("coco", tmp_path / "out", "val").content
    assert written["images"] == content["images"]
    assert [c["id"] for c in written["categories"]] == [3, 7]
    for ours, theirs in zip(written["annotations"], content["annotations"], strict=True):
        assert {k: v for k, v in ours.items() if k != "id"} == {
            k: v for k, v in theirs.items() if k != "id"
        }
    assert not (tmp_path / "out" / "val2017" / "5.png").is_symlink()


def test_crowds_are_difficult_in_voc_and_left_out_of_yolo(
    content: Content, write: Write, tmp_path: Path
) -> None:
    content["annotations"][0]["iscrowd"] = 1
    json_path, folder = write(content)
    source = read_coco_file(json_path, folder)
    assert convert({"train": source}, "voc", tmp_path / "v", copy=False) == [
        "train: 3 images, 3 boxes",
        "  notice: images without boxes: 1 of 3 ('5.png'); "
        "training keeps them, as examples of background",
    ]
    voc = read_source("voc", tmp_path / "v", "train")
    assert sorted(a["iscrowd"] for a in voc.content["annotations"]) == [0, 0, 1]
    lines = convert({"train": source}, "yolo", tmp_path / "y", copy=False)
    assert lines[2] == "  notice: crowd boxes, which YOLO cannot represent, left out: 1"
    assert (tmp_path / "y" / "labels" / "train" / "5.txt").read_text() == ""


@pytest.mark.parametrize("target", FORMATS)
def test_images_of_one_name_in_two_splits_stay_apart(
    content: Content, write: Write, tmp_path: Path, target: str
) -> None:
    json_path, folder = write(content)
    other = tmp_path / "other"
    other.mkdir()
    for image in content["images"]:
        Image.new("RGB", (40, 30), "red").save(other / image["file_name"])
    sources = {
        "train": read_coco_file(json_path, folder),
        "val": read_coco_file(json_path, other),
    }
    convert(sources, target, tmp_path / "out", copy=False)
    red = np.full((30, 40, 3), (255, 0, 0))
    for split, same in (("train", False), ("val", True)):
        source = read_source(target, tmp_path / "out", split)
        assert len(source.content["images"]) == 3
        for image in source.content["images"]:
            with Image.open(source.image_dir / image["file_name"]) as image:
                assert np.array_equal(np.asarray(image), red) == same


def test_stems_that_differ_by_suffix_alone_stay_apart(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("a.bmp", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / name)
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.bmp"}],
        "annotations": [{"id": 1, "image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    for target in ("voc", "yolo"):
        out = tmp_path / target
        convert({"train": Source(content, tmp_path, tmp_path)}, target, out, copy=False)
        found = targets(read_source(target, out, "train"))
        assert sorted(map(len, found.values())) == [0, 1]


def test_yolo_is_of_the_upright_image(content: Content, write: Write, tmp_path: Path) -> None:
    """Boxes of the stored pixels are turned with an image that other tools turn."""
    json_path, folder = write(content)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "9.jpg", exif=exif)
    Image.new("RGB", (30, 40)).save(folder / "2.jpg", exif=exif)
    for image, name in zip(content["images"][1:], ("9.jpg", "2.jpg"), strict=True):
        image["file_name"] = name
    source = Source(content, folder, json_path)
    convert({"train": source}, "yolo", tmp_path / "y", copy=False)
    expected = targets(source)
    found = targets(read_source("yolo", tmp_path / "y", "train"))
    assert {name: found[name] for name in ("2", "5")} == {n: expected[n] for n in ("2", "5")}
    ((_, (x, y, width, height)),) = expected["9"]
    ((class_name, box),) = found["9"]
    assert class_name == "dog"
    assert box == pytest.approx([1 - y, x, height, width], abs=1e-6)


def test_yolo_fractions_end_at_the_edges(content: Content, write: Write, tmp_path: Path) -> None:
    """Tools that read YOLO pass over all boxes of an image that has a number above 1."""
    for number, bbox in enumerate([[30, -5, 20, 15], [50, 4, 9, 9], [0, 0, 40, 30]]):
        content["annotations"][number]["bbox"] = bbox
    json_path, folder = write(content)
    source = read_coco_file(json_path, folder)
    lines = convert({"train": source}, "yolo", tmp_path / "y", copy=False)
    assert lines[1:] == [
        "  notice: boxes outside their image: 1 ('9.png' annotation 1 [50, 4, 9, 9]); "
        "training skips them; evaluation counts them as missed",
        "  notice: boxes that extend past their image: 1 ('5.png' annotation 0 [30, -5, 20, 15] in "
        "40 x 30); training clips them",
        "  notice: images without boxes: 1 of 3 ('9.png'); "
        "training keeps them, as examples of background",
        "  notice: boxes outside their image, left out: 1",
        "  notice: boxes that extend past their image, clipped: 1",
    ]
    labels = tmp_path / "y" / "labels" / "train"
    values = [float(word) for word in (labels / "5.txt").read_text().split()]
    assert values == pytest.approx([1, 35 / 40, 5 / 30, 10 / 40, 10 / 30])
    assert (labels / "9.txt").read_text() == ""
    assert (labels / "2.txt").read_text() == "1 0.5 0.5 1 1\n"
    found, expected = targets(read_source("yolo", tmp_path / "y", "train")), targets(source)
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        assert [label for label, _ in ours] == [label for label, _ in expected[name]]
        for (_, box), (_, wanted) in zip(ours, expected[name], strict=True):
            assert box == pytest.approx(wanted, abs=1e-6)


def test_entries_of_one_file_share_it(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "./a.png"}],
        "annotations": [{"id": 1, "image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    before = (tmp_path / "a.png").read_bytes()
    for copy in (False, True):
        out = tmp_path / f"out{copy}"
        convert({"train": Source(content, tmp_path, tmp_path)}, "coco", out, copy=copy)
        assert len(read_source("coco", out, "train").content["images"]) == 2
        assert (out / "train2017" / "a.png").read_bytes() == before
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("target", FORMATS)
def test_names_that_are_no_text(
    content: Content, write: Write, tmp_path: Path, target: str
) -> None:
    """A name in Latin-1 from an old archive, a line break, and one too long to be a file."""
    json_path, folder = write(content)
    for image, name in zip(
        content["images"], (os.fsdecode(b"caf\xe9.png"), "a\nb.png"), strict=False
    ):
        (folder / image["file_name"]).rename(folder / name)
        image["file_name"] = name
    content["images"][2]["file_name"] = f"data:image/png;base64,{'A' * 300}/b.png"
    source = Source(content, folder, json_path)
    lines = convert({"train": source}, target, tmp_path / "out", copy=False)
    assert lines[0] == "train: 2 images, 2 boxes"
    assert "missing images: 1 of 3" in lines[1]
    assert len(lines[1]) < 300
    assert sum(map(len, targets(read_source(target, tmp_path / "out", "train")).values())) == 2


@pytest.mark.parametrize("names", [("cat", "cat "), ("cat", "a\x01"), ("cat", "\ud800")])
def test_classes_that_voc_cannot_distinguish_are_refused(
    content: Content, write: Write, tmp_path: Path, names: tuple[str, str]
) -> None:
    json_path, folder = write(content)
    for category, name in zip(content["categories"], names, strict=True):
        category["name"] = name
    with pytest.raises(DataError, match="is empty, repeated or cannot be written in XML"):
        convert({"train": Source(content, folder, json_path)}, "voc", tmp_path / "v", copy=False)
    assert not (tmp_path / "v").exists()


def test_nothing_is_overwritten(content: Content, write: Write, tmp_path: Path) -> None:
    json_path, folder = write(content)
    source = read_coco_file(json_path, folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for place in (out, out / "mine.txt"):
        with pytest.raises(DataError, match="not a new or empty folder"):
            convert({"train": source}, "coco", place, copy=False)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_yolo_splits_need_the_same_classes(content: Content, write: Write, tmp_path: Path) -> None:
    json_path, folder = write(content)
    train = read_coco_file(json_path, folder)
    other = json.loads(json_path.read_text())
    other["categories"][0]["name"] = "bird"
    sources = {"train": train, "val": Source(other, folder, json_path)}
    with pytest.raises(DataError, match="the splits have different classes"):
        convert(sources, "yolo", tmp_path / "y", copy=False)


def test_command_line(
    content: Content, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path, folder = write(content)
    out = str(tmp_path / "out")
    command = ["convert", "--from", "coco", "--data_path", str(json_path), "--images", str(folder),
               "--to", "yolo", "--output_dir", out]  # fmt: skip
    assert main(command) == 2
    assert "--images: needs exactly one split with it" in capsys.readouterr().err
    assert main([*command, "--from", "voc", "--splits", "train"]) == 2
    assert "--images: has no effect on voc data" in capsys.readouterr().err
    assert main([*command, "--splits", "train"]) == 0
    assert "train: 3 images, 3 boxes" in capsys.readouterr().out
    assert main([*command, "--splits", "train"]) == 2
    assert "not a new or empty folder" in capsys.readouterr().err
    assert main(["convert", "--to", "yolo"]) == 2
    assert capsys.readouterr().err == "error: --data_path: is missing. Add it.\n"
