"""Data options: where a split lies, and which preparation it gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import DataConfig
from datasets.build import build_dataset, build_transform, data_paths, load_index, read_split
from datasets.formats.coco import read_coco_file
from datasets.formats.convert import convert
from util.errors import DataError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_coco_layout_and_explicit_paths() -> None:
    cfg = DataConfig(coco_path="coco", val_images="mine", val_annotations="mine.json")
    assert data_paths(cfg, "train") == (
        Path("coco/annotations/instances_train2017.json"),
        Path("coco/train2017"),
    )
    assert data_paths(cfg, "val") == (Path("mine.json"), Path("mine"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "train data: no option says where it is. Set `coco_path`, or `train_images`"),
        ({"train_images": "x"}, "`train_images`: needs `train_annotations` too"),
        (
            {"train_annotations": "x", "coco_path": "y"},
            "`train_annotations`: needs `train_images` too",
        ),
    ],
)
def test_incomplete_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data_paths(DataConfig(**options), "train")


def test_data_set_follows_its_options(
    content: dict[str, Any], write: Callable[[dict[str, Any]], tuple[Path, Path]]
) -> None:
    json_path, folder = write(content)
    cfg = DataConfig(
        train_images=str(folder), train_annotations=str(json_path), eval_scale=60, max_size=90
    )
    index = load_index(cfg, "train")
    fixed = build_dataset(cfg, index, train=False, mean=MEAN, std=STD)
    assert fixed.transform.output_size(30, 40) == (60, 80)
    item = fixed[0]
    assert isinstance(item, tuple)
    assert -2 <= item[0].min() < -1
    assert 1 < item[0].max() <= 2
    random = build_dataset(cfg, index, train=True, mean=MEAN, std=STD, seed=1)
    assert random.transform.output_size(30, 40) is None


def test_published_recipe_is_the_default() -> None:
    transform = build_transform(DataConfig(), train=False, mean=MEAN, std=STD)
    assert transform.output_size(480, 640) == (800, 1066)


@pytest.mark.parametrize(
    ("share", "kept"), [(1.0, [0, 1, 2, 3, 4, 5]), (0.5, [0, 1, 4, 5]), (0.0, [1, 4])]
)
def test_a_share_of_the_images_without_boxes_is_trained_on(
    content: dict[str, Any],
    write: Callable[[dict[str, Any]], tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
    share: float,
    kept: list[int],
) -> None:
    """Images 1 and 4 have boxes; of the others, the first and the last are half."""
    image, box = content["images"][0], content["annotations"][0]
    content["images"] = [{**image, "id": i, "file_name": f"{i}.png"} for i in range(6)]
    content["annotations"] = [{**box, "id": i, "image_id": i} for i in (4, 1)]
    content["annotations"].append({**box, "id": 9, "image_id": 0, "iscrowd": 1})
    json_path, folder = write(content)
    places = {f"{split}_images": str(folder) for split in ("train", "val")}
    places |= {f"{split}_annotations": str(json_path) for split in ("train", "val")}
    cfg = DataConfig(**places, empty_images=share)  # type: ignore[arg-type]
    index = load_index(cfg, "train")
    assert index.images.ids.tolist() == kept
    assert index.boxes_per_image.tolist() == [int(i in (1, 4)) for i in kept]
    assert index.images.ids[index.annotations.image].tolist() == [4, 1] + [0] * (0 in kept)
    told = f"empty_images {share:g}: {6 - len(kept)} of 6 training images are left out"
    assert (told in capsys.readouterr().out) == (share < 1)
    assert len(load_index(cfg, "val")) == 6


@pytest.mark.parametrize("target", ["coco", "voc", "yolo"])
def test_a_data_path_in_any_format(
    content: dict[str, Any],
    write: Callable[[dict[str, Any]], tuple[Path, Path]],
    tmp_path: Path,
    target: str,
) -> None:
    json_path, folder = write(content)
    source = read_coco_file(json_path, folder)
    convert({"mine": source}, target, tmp_path / "out", copy=False)
    cfg = DataConfig(
        data_format=target,
        data_path=str(tmp_path / "out"),
        train_split="mine",
        val_images=str(folder),
        val_annotations=str(json_path),
        coco_path="nowhere",
    )
    for split in ("train", "val"):
        index = load_index(cfg, "train" if split == "train" else "val")
        assert sorted(index.images.file_names) == ["2.png", "5.png", "9.png"]
        assert len(index.boxes) == 3
    assert len(read_split(cfg, "train").content["annotations"]) == 3
