"""Detection in images without annotations: drawn copies and one JSON file."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from engine.evaluation.evaluate import PostProcessor, detect
from util.batch import Batch
from util.classes import Classes
from util.console import console
from util.draw import draw_boxes
from util.errors import ConfigError, DataError
from util.files import make_output_dir, write_atomic

_KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")


def predict(
    model: nn.Module,
    postprocess: PostProcessor,
    batches: Iterable[Batch],
    *,
    paths: Sequence[Path],
    read_image: Callable[[Path], Image.Image],
    classes: Classes,
    output_dir: Path,
    device: torch.device,
    score_thresholds: Sequence[float],
) -> list[dict[str, Any]]:
    """Write a drawn copy of each image and `predictions.json`; return what that holds.

    The `image_id` of a target is the position in `paths`; `read_image` decodes one upright.
    Boxes that reach their label's of `score_thresholds` are drawn, the file has all: COCO results
    with the image's and the category's name. Unreadable images are named and left out.

    Raises:
        ConfigError: a drawn copy would overwrite one of the images.
        DataError: no image could be read.
    """
    names = relative_names(paths)
    outputs = output_paths(names, output_dir)
    refuse_overwriting(paths, outputs)
    make_output_dir(output_dir)
    predictions: list[dict[str, Any]] = []
    done, drawn, unreadable = 0, 0, 0
    for batch, found in detect(model, postprocess, batches, device=device, description="predict"):
        unreadable += len(batch.unreadable)
        for target, detection in zip(batch.targets, found, strict=True):
            i = int(target["image_id"])
            detection = _named_only(detection, classes)
            image, count = _draw(read_image(paths[i]), detection, classes, score_thresholds)
            _save(image, outputs[i])
            predictions += _to_json(i, names[i], detection, classes)
            done, drawn = done + 1, drawn + count
    if not done:
        raise DataError(f"--input: expected images, got {unreadable} that cannot be read.")
    predictions.sort(key=lambda p: (p["image_id"], -p["score"]))
    write_atomic(output_dir / "predictions.json", json.dumps(predictions, indent=1) + "\n")
    least = sorted({t for k, t in enumerate(score_thresholds) if classes.in_use(k)})
    reached = f"score {least[0]}" if len(least) == 1 else "their class's score threshold"
    console(
        f"written to {output_dir}: {done} images with {drawn} boxes of {reached} or more, "
        "predictions.json" + (f"; {unreadable} images could not be read" if unreadable else "")
    )
    return predictions


def relative_names(paths: Sequence[Path]) -> list[Path]:
    """Return the images' names relative to the deepest folder that holds them all."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if not absolute:
        return []
    root = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(root) for path in absolute]


def output_paths(names: Sequence[Path], output_dir: Path) -> list[Path]:
    """Return where the drawn copies go: PNG and JPEG as the image is, PNG for all others.

    A name that is taken, be it in other case, gets a number.
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


def refuse_overwriting(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raise ConfigError if an output is an input, under whatever name or link."""
    files = {_identity(path) for path in inputs if path.exists()}
    for output in outputs:
        if output.exists() and _identity(output) in files:
            raise ConfigError(
                f"--output_dir: expected a folder where no input lies, but '{output}' is one and "
                "would be overwritten. Choose another folder."
            )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _named_only(detection: dict[str, Tensor], classes: Classes) -> dict[str, Tensor]:
    """Drop the labels that stand for no category (unused ids of the official 91-logit head)."""
    named = torch.tensor([classes.in_use(label) for label in range(len(classes))])[
        detection["labels"]
    ]
    return {key: value[named] for key, value in detection.items()}


def _draw(
    image: Image.Image,
    detection: dict[str, Tensor],
    classes: Classes,
    score_thresholds: Sequence[float],
) -> tuple[Image.Image, int]:
    """Return a drawn copy and the number of boxes in it."""
    least = torch.tensor(score_thresholds, dtype=torch.float64)[detection["labels"]]
    shown = detection["scores"] >= least
    labels = detection["labels"][shown].tolist()
    scores = detection["scores"][shown].tolist()
    names = [classes.shown(label) for label in labels]
    return draw_boxes(image, detection["boxes"][shown], labels, names, scores), len(labels)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        image.save(path, format="PNG")
    else:
        image.save(path, format="JPEG", quality=95)


def _to_json(
    image_id: int, name: Path, detection: dict[str, Tensor], classes: Classes
) -> list[dict[str, Any]]:
    boxes_xyxy = detection["boxes"].double()
    boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1)
    return [
        {
            "image_id": image_id,
            "file_name": name.as_posix(),
            "category_id": classes.ids[label],
            "category_name": classes.shown(label),
            "bbox": box,
            "score": score,
        }
        for label, box, score in zip(
            detection["labels"].tolist(),
            boxes_xywh.tolist(),
            detection["scores"].tolist(),
            strict=True,
        )
    ]
