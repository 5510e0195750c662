"""`main.py predict`: drawn copies of images with what a checkpoint finds in them, and one JSON."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from configs.options import Checked, option
from datasets.dataset import find_images
from datasets.images import read_rgb
from engine.detector import Box, Detector
from util.classes import Classes
from util.console import console, in_line
from util.draw import draw_boxes
from util.errors import ConfigError, DataError
from util.files import atomic_path, make_output_dir, refuse_overwriting, write_atomic

_KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")
_MAX_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Checked):
    """What `predict` needs; everything else is in the checkpoint."""

    checkpoint: str = option("", "our or official file, Hugging Face folder, or hf:NAME")
    input: tuple[str, ...] = option((), "images, folders or globs")
    output_dir: str = option("", "folder for images and predictions.json")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    batch_size: int = option(1, "images per step", low=1, most=65536)
    score_threshold: float | None = option(
        None, "minimum score to draw (default: per-class thresholds from the checkpoint, else 0.3)",
        low=0, high=1,
    )  # fmt: skip
    eval_scale: int | None = option(
        None, "short side, pixels (default: the checkpoint's)", low=16, most=16384, unset=0
    )
    max_size: int | None = option(
        None, "maximum long side, pixels (default: the checkpoint's)", low=16, most=65536, unset=0
    )
    num_select: int | None = option(
        None, "detections kept per image, all classes together (default: the checkpoint's)", low=1,
        most=100000,
    )  # fmt: skip
    nms_iou: float | None = option(
        None, "NMS IoU threshold; 1 disables NMS (default: the checkpoint's)",
        above=0, high=1, unset=0,
    )  # fmt: skip
    max_pixels: int | None = option(
        None, "pixels of the largest image that is read (default: the checkpoint's)", low=1,
        rare=True,
    )  # fmt: skip
    num_workers: int = option(
        -1, "data-loading workers; -1: one per core, at most 8", low=-1, most=1024
    )


SECTIONS = {"predict": PredictOptions}


def main(options: PredictOptions) -> int:
    """Draw what a checkpoint finds in images, and write it as JSON."""
    if not options.input or not options.output_dir:
        raise ConfigError("predict: give `input IMAGES ...` and `output_dir DIR`.")
    paths = find_images(options.input)
    detector = Detector.load(
        options.checkpoint,
        device=options.device,
        eval_scale=options.eval_scale,
        max_size=options.max_size,
        num_select=options.num_select,
        nms_iou=options.nms_iou,
        max_pixels=options.max_pixels,
    )
    thresholds = detector.min_scores(options.score_threshold)
    output_dir = Path(options.output_dir)
    write_predictions(
        detector,
        paths,
        output_dir,
        thresholds=thresholds,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    known = detector.thresholds if options.score_threshold is None else {}
    report_thresholds(output_dir, thresholds, known)
    return 0


def write_predictions(
    detector: Detector,
    paths: Sequence[Path],
    output_dir: Path,
    *,
    thresholds: Mapping[str, float],
    batch_size: int = 1,
    num_workers: int = 0,
) -> None:
    """Write a drawn copy of each image, and `predictions.json`.

    Boxes whose score reaches their class's threshold are drawn. The file has all: COCO results
    with the names of image and category, ordered by image and score. Unreadable images are named
    and skipped.

    Raises:
        ConfigError: a drawn copy would overwrite one of the images.
        DataError: no image could be read.
    """
    names = relative_names(paths)
    outputs = output_paths(names, output_dir)
    refuse_overwriting(paths, outputs)
    make_output_dir(output_dir)
    drawn = 0
    # Images come by size: their entries wait in a file, not in memory, to be put in order.
    places: dict[int, tuple[int, int]] = {}
    with tempfile.TemporaryFile("w+", encoding="ascii", dir=output_dir) as entries:
        for i, boxes in detector.detect(
            paths, batch_size=batch_size, num_workers=num_workers, description="predict"
        ):
            shown = [box for box in boxes if box.score >= thresholds[box.name]]
            drawn += len(shown)
            drawn_image = draw_boxes(
                read_rgb(paths[i], None),
                torch.tensor([box.xyxy for box in shown]).reshape(-1, 4),
                [detector.classes.label_of[box.category_id] for box in shown],
                [box.name for box in shown],
                [box.score for box in shown],
            )
            outputs[i].parent.mkdir(parents=True, exist_ok=True)
            drawn_image.save(outputs[i], quality=95)  # of JPEG; the suffix says which format
            text = json.dumps(_to_json(i, names[i], boxes, detector.classes), indent=1)
            places[i] = entries.tell(), entries.write(text[2:-2])
        if not places:
            raise DataError(f"`input`: none of the {len(paths)} images can be read.")
        in_order = [place for _, place in sorted(places.items()) if place[1]]
        _write_list(output_dir / "predictions.json", entries, in_order)
    levels = sorted(set(thresholds.values()))
    reached = f"score {levels[0]}" if len(levels) == 1 else "the score threshold of their class"
    unreadable = len(paths) - len(places)
    console(
        f"written to {output_dir}: {len(places)} images with {drawn} boxes at or above {reached}, "
        "and predictions.json" + (f"; {unreadable} images could not be read" if unreadable else "")
    )


def _write_list(path: Path, entries: TextIO, places: Sequence[tuple[int, int]]) -> None:
    """Write a JSON list of the entries at these places, (start, length), of a file."""
    with atomic_path(path) as part, part.open("w", encoding="ascii") as file:
        for number, (start, length) in enumerate(places):
            entries.seek(start)
            file.write((",\n" if number else "[\n") + entries.read(length))
        file.write("\n]\n" if places else "[]\n")


def relative_names(paths: Sequence[Path]) -> list[Path]:
    """Return the images' names relative to the deepest folder that holds them all."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    root = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(root) for path in absolute]


def output_paths(names: Sequence[Path], output_dir: Path) -> list[Path]:
    """Return where the drawn copies go: PNG and JPEG as the image is, PNG for all others.

    A name that is taken, in whatever case, gets a number.
    """
    taken: set[str] = set()
    outputs = []
    for name in names:
        suffix = name.suffix if name.suffix.lower() in _KEPT_SUFFIXES else ".png"
        candidate, number = name.with_suffix(suffix), 1
        while str(candidate).casefold() in taken:
            number += 1
            candidate = name.with_name(f"{name.stem}_{number}{suffix}")
        taken.add(str(candidate).casefold())
        outputs.append(output_dir / candidate)
    return outputs


def _to_json(
    image_id: int, name: Path, boxes: Sequence[Box], classes: Classes
) -> list[dict[str, object]]:
    return [
        {
            "image_id": image_id,
            "file_name": name.as_posix(),
            "category_id": classes.given_id(classes.label_of[box.category_id]),
            "category_name": box.name,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": box.score,
        }
        for box in boxes
        for x0, y0, x1, y1 in [box.xyxy]
    ]


def report_thresholds(
    output_dir: Path, thresholds: Mapping[str, float], known: Mapping[str, float]
) -> None:
    """Write `score_thresholds.json`, and print those that are `known` from the checkpoint."""
    path = output_dir / "score_thresholds.json"
    text = json.dumps(thresholds, indent=1, ensure_ascii=False)
    write_atomic(path, f"{text}\n", errors="backslashreplace")
    shown = [
        f"{in_line(name)} {threshold:.2f}"
        for name, threshold in thresholds.items()
        if name in known
    ]
    if shown:
        more = f", ... ({len(shown)}, all in {path.name})" if len(shown) > _MAX_SHOWN else ""
        others = {f"{threshold:.2f}" for name, threshold in thresholds.items() if name not in known}
        console(
            "score thresholds from the checkpoint's last evaluation: "
            f"{', '.join(shown[:_MAX_SHOWN])}{more}"
            f"{''.join(f'; {threshold} for the other classes' for threshold in others)}. "
            "--score_threshold sets one for all."
        )
