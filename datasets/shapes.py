"""The generated `shapes` data set, in COCO layout: `python -m datasets.shapes --output_dir DIR`."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from datasets.shape_drawing import CATEGORY_IDS, draw_image
from util.errors import DataError, UserError

_VERSION = 4  # counts changes of the drawing, so that an old folder is not taken for a new one
_FIRST_IMAGE_ID = {"train": 1, "val": 500_000}


def generate_shapes(output_dir: Path, *, num_train: int, num_val: int, seed: int) -> None:
    """Write train2017/, val2017/ and annotations/ of drawn shapes with their exact boxes.

    An image depends on (seed, split, index) alone. A folder that already holds exactly this set
    is left as it is; an interrupted run leaves none.

    Raises:
        DataError: `output_dir` holds anything else.
    """
    counts = {"train": num_train, "val": num_val}
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        _check_existing(output_dir, counts, seed)
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".shapes-") as scratch:
        unfinished = Path(scratch) / "set"
        (unfinished / "annotations").mkdir(parents=True)
        for split, count in counts.items():
            _write_split(unfinished, split, count, seed)
        if output_dir.exists():
            output_dir.rmdir()
        unfinished.rename(output_dir)


def _info(split: str, count: int, seed: int) -> dict[str, Any]:
    return {
        "description": "drawn shapes",
        "generator": "shapes",
        "generator_version": _VERSION,
        "split": split,
        "num_pictures": count,
        "seed": seed,
    }


def _annotation_file(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}2017.json"


def _check_existing(folder: Path, counts: dict[str, int], seed: int) -> None:
    for split, count in counts.items():
        try:
            content = json.loads(_annotation_file(folder, split).read_text(encoding="utf-8"))
            found = content["info"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, dict) or found.get("generator") != "shapes":
            raise DataError(
                f"`output_dir {folder}`: the folder has other content. Choose a new or empty one."
            )
        if found != _info(split, count, seed):
            raise DataError(
                f"`output_dir {folder}`: it holds {found.get('num_pictures')} {split} images of "
                f"seed {found.get('seed')} (drawing version {found.get('generator_version')}), not "
                f"{count} of seed {seed} (version {_VERSION}). Delete it or choose another folder."
            )
        if sum(1 for _ in (folder / f"{split}2017").glob("*.jpg")) != count:
            raise DataError(
                f"{folder / f'{split}2017'}: some of the {count} images are gone. "
                "Delete the folder and generate it again."
            )


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    image_dir = folder / f"{split}2017"
    image_dir.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng((seed, list(_FIRST_IMAGE_ID).index(split), index))
        image, objects = draw_image(rng)
        image_id = _FIRST_IMAGE_ID[split] + index
        name = f"{image_id:06d}.jpg"
        image.save(image_dir / name, quality=92, subsampling=0)
        images.append(
            {"id": image_id, "file_name": name, "width": image.width, "height": image.height}
        )
        for one in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": one.category_id,
                    "bbox": list(one.box_xywh),
                    "area": one.area,
                    "iscrowd": 0,
                }
            )
    content = {
        "info": _info(split, count, seed),
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in CATEGORY_IDS.items()],
    }
    _annotation_file(folder, split).write_text(json.dumps(content), encoding="utf-8")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m datasets.shapes", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--num_train", type=int, default=2800, help="default: 2800")
    parser.add_argument("--num_val", type=int, default=200, help="default: 200")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    try:
        generate_shapes(
            args.output_dir, num_train=args.num_train, num_val=args.num_val, seed=args.seed
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.output_dir}: {args.num_train} training and {args.num_val} validation images.")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
