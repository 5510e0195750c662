"""Write YOLO data: data.yaml, images in images/ and a text file for each in labels/."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from datasets.checks.findings import first_few
from datasets.formats.registry import Placer, Split, as_text, write_text
from datasets.images import TURNED, read_header, upright_point
from util.errors import DataError
from util.files import make_output_dir, write_atomic


def write_yolo(splits: Sequence[Split], output_dir: Path, placer: Placer) -> list[list[str]]:
    """Write splits; classes are numbered from 0 in order of id, and crowds are left out.

    Raises:
        DataError: the splits have different classes, which YOLO numbers once for all.
    """
    if len({(split.ids, split.class_names) for split in splits}) > 1:
        raise DataError(
            f"{output_dir}: the splits have different classes, but YOLO numbers them once for all. "
            "Convert each split alone."
        )
    make_output_dir(output_dir)
    notices = [_write_labels(split, output_dir, placer) for split in splits]
    content: dict[str, Any] = {split.name: f"images/{split.name}" for split in splits}
    content["names"] = dict(enumerate(splits[0].class_names))
    write_atomic(
        output_dir / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )
    return notices


def _write_labels(split: Split, output_dir: Path, placer: Placer) -> list[str]:
    """Write the images and label files of a split; return a line on all that is lost."""
    crowds = outside = cut = 0
    unusable = []
    images, labels = output_dir / "images" / split.name, output_dir / "labels" / split.name
    for image in split.images:
        header = read_header(image.file)
        if header is None:
            unusable.append(repr(image.name))
            continue
        name = placer.free(image.name, images, split.name)
        placer.put(image, images / name)
        lines = []
        for label, box, crowd in zip(image.labels, image.xywh, image.crowd, strict=True):
            whole = _fractions(box, image.size, *header)
            values = _within(whole)
            if crowd:
                crowds += 1
            elif values is None:
                outside += 1
            else:
                cut += values != whole
                lines.append(f"{label} {' '.join(map(as_text, values))}\n")
        write_text((labels / name).with_suffix(".txt"), "".join(lines))
    lost = {
        "crowd boxes, which YOLO cannot represent, left out": crowds,
        "boxes outside their image, left out": outside,
        "boxes that extend past their image, clipped": cut,
    }
    notices = [f"{what}: {number}" for what, number in lost.items() if number]
    if unusable:
        notices.append(f"unreadable images, left out: {len(unusable)} ({first_few(unusable)})")
    return notices


def _fractions(
    box: list[float], counted: tuple[int, int], stored: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """Return centre and size as fractions of the upright image.

    The box is of that image if its size is the one that counts, else of the stored pixels.
    """
    turned = orientation in TURNED
    upright = turned and counted == stored[::-1] != stored
    height, width = counted if upright else stored
    x, y, w, h = box
    cx, cy, w, h = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
    if upright:
        return cx, cy, w, h
    return (*upright_point(cx, cy, orientation), *((h, w) if turned else (w, h)))


def _within(
    fractions: tuple[float, float, float, float],
) -> tuple[float, float, float, float] | None:
    """Return centre and size of what lies in the image, None for nothing.

    Other tools refuse more; what is past the edge by rounding alone is left as it is.
    """
    sides = [(c - s / 2, c + s / 2) for c, s in zip(fractions[:2], fractions[2:], strict=True)]
    if all(low > -1e-7 and high < 1 + 1e-7 for low, high in sides):
        return fractions
    (x0, x1), (y0, y1) = ((max(0.0, low), min(1.0, high)) for low, high in sides)
    return ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0) if x1 > x0 and y1 > y0 else None
