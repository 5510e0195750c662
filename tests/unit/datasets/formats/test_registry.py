"""A new data format is one new file and one registration line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import DataConfig
from datasets.build import load_index, read_split
from datasets.formats.registry import FORMATS
from main import main
from util.errors import ConfigError

# Boxes of one class as a table: name, x, y, width, height. The option says what separates them.
NEW_FILE = """
from pathlib import Path

from datasets.formats.registry import FORMATS, Format, Source
from util.files import make_output_dir


def read(place, split, *, voc_corners):
    rows = [line.split("\\t") for line in (place / f"{split}.tsv").read_text().splitlines()]
    ids = {name: i for i, name in enumerate(dict.fromkeys(row[0] for row in rows))}
    images = [{"id": i, "file_name": name} for name, i in ids.items()]
    annotations = [
        {"id": i, "image_id": ids[name], "category_id": 1, "bbox": [float(v) for v in box]}
        for i, (name, *box) in enumerate(rows)
    ]
    categories = [{"id": 1, "name": f"thing, {voc_corners}"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return Source(content, place / "images", place)


def write(splits, output_dir, placer, *, voc_corners):
    make_output_dir(output_dir)
    for split in splits:
        rows = []
        for image in split.images:
            placer.put(image, output_dir / "images" / image.name)
            rows += ["\\t".join(map(str, [image.name, *box])) + "\\n" for box in image.xywh]
        (output_dir / f"{split.name}.tsv").write_text("".join(rows))
    return [["classes are lost"] for _ in splits]


FORMATS.register("tsv")(Format(read, write, options=("voc_corners",)))
"""


def test_a_new_format_is_one_file_and_one_registration_line(
    content: dict[str, Any],
    write: Callable[[dict[str, Any]], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tsv_format.py").write_text(NEW_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(FORMATS, "_entries", {**FORMATS._entries})
    monkeypatch.setitem(FORMATS.modules, "tsv", "tsv_format")  # in the file: "tsv": ".tsv"

    json_path, folder = write(content)
    table = str(tmp_path / "table")
    command = ["convert", "--from", "coco", "--data_path", str(json_path), "--images", str(folder),
               "--splits", "train", "--to", "tsv", "--output_dir", table]  # fmt: skip
    assert main(command) == 0
    assert "notice: classes are lost" in capsys.readouterr().out

    data = ["--data_format", "tsv", "--data_path", table, "--voc_corners", "edges"]
    scales = ["--train_scales", "64", "--max_size", "96", "--num_workers", "0"]
    assert main(["check", "--splits", "train", *data, *scales]) == 1
    assert "annotations without a valid area or iscrowd" in capsys.readouterr().out

    cfg = DataConfig(data_format="tsv", data_path=table, voc_corners="edges")
    index = load_index(cfg, "train")
    assert index.classes.names == ("thing, edges",)
    assert sorted(map(tuple, index.annotations.xywh.tolist())) == sorted(
        tuple(map(float, annotation["bbox"])) for annotation in content["annotations"]
    )
    back = str(tmp_path / "back")
    assert main(["convert", "--from", "tsv", "--data_path", table, "--splits", "train",
                 "--to", "coco", "--output_dir", back]) == 0  # fmt: skip
    written = json.loads((tmp_path / "back/annotations/instances_train2017.json").read_text())
    assert len(written["annotations"]) == len(content["annotations"])


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="data_format cocoo: .*Did you mean 'coco'"):
        read_split(DataConfig(data_format="cocoo", data_path="x"), "train")


@pytest.mark.parametrize(("option", "name"), [("--from", "data_format"), ("--to", "to")])
def test_convert_names_the_option_whose_format_is_unknown(
    option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "--data_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main([*command, option, "cocoo"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --{name} cocoo: does not exist. Did you mean 'coco'?\n"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_registered_file_reads_and_writes(name: str) -> None:
    found = FORMATS[name]
    assert callable(found.read)
    assert callable(found.write)
