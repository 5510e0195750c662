"""Write a data set in another format: annotations anew, images linked or copied."""

import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import yaml

from datasets.checks.coco_json import check_content
from datasets.checks.findings import Finding, first_few
from datasets.checks.images import complete_sizes
from datasets.formats.sources import Source, coco_layout
from datasets.images import TURNED, read_header, upright_point
from util.errors import DataError
from util.files import make_output_dir, write_atomic

# What XML 1.0 has no place for, and line breaks, which end a name in a list.
_NOT_IN_XML = re.compile(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _SplitImage:
    """An image to write: `size` is (height, width), (0, 0) where it is unknown.

    Shape: labels [K]; xywh [K,4] pixels; area [K]; crowd [K].
    """

    id: int
    name: str
    file: Path
    size: tuple[int, int]
    labels: list[int]
    xywh: list[list[float]]
    area: list[float]
    crowd: list[bool]


@dataclass(frozen=True)
class _Split:
    name: str
    ids: tuple[int, ...]
    class_names: tuple[str, ...]
    images: list[_SplitImage]


def convert(
    sources: Mapping[str, Source],
    target: str,
    output_dir: Path,
    *,
    copy: bool,
    voc_corners: str = "pixels",
) -> list[str]:
    """Write splits as COCO, VOC or YOLO under `output_dir`; return a line on each and its flaws.

    What the checks leave out is not written, nor are images that are not there. COCO keeps the
    ids of images and classes; VOC knows classes by name and orders them so; YOLO numbers them
    from 0 in order of id and has no place for crowds, which are left out.

    Raises:
        DataError: `output_dir` holds something already, or a split cannot be used.
        ConfigError: `output_dir` cannot be made.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise DataError(f"{output_dir}: expected a new or empty folder. Choose another.")
    writers: dict[str, Callable[[_Split, Path, _Placer], list[str]]] = {
        "coco": _write_coco,
        "voc": lambda split, folder, place: _write_voc(split, folder, place, voc_corners),
        "yolo": _write_yolo,
    }
    lines = []
    place = _Placer(copy=copy)
    splits = [_gather(name, source) for name, source in sources.items()]
    if len({(split.ids, split.class_names) for split, _ in splits}) > 1 and target == "yolo":
        raise DataError(
            f"{output_dir}: expected splits with the same classes, got different ones. "
            "YOLO numbers them once for all: convert each alone."
        )
    if target == "voc":
        for split, _ in splits:
            _check_voc_names(split.class_names, output_dir)
    make_output_dir(output_dir)
    for split, findings in splits:
        notices = [finding.text for finding in findings]
        notices += writers[target](split, output_dir, place)
        boxes = sum(len(image.labels) for image in split.images)
        lines.append(f"{split.name}: {len(split.images)} images, {boxes} boxes")
        lines += [f"  notice: {notice}" for notice in notices]
    return lines


class _Placer:
    """Links or copies images; no two take the same name without suffix in a folder."""

    def __init__(self, *, copy: bool) -> None:
        self._copy = copy
        self._taken: set[Path] = set()

    def free(self, name: str, folder: Path, split: str) -> str:
        """Return `name`, changed where another image of the folder is called so."""
        path = PurePath(name)
        stems = [path.stem, f"{split}_{path.stem}"]
        number = 2
        while folder / path.with_name(stems[0]) in self._taken:
            stems = [*stems[1:], f"{split}_{path.stem}_{number}"]
            number += 1
        self._taken.add(folder / path.with_name(stems[0]))
        return path.with_name(stems[0] + path.suffix).as_posix()

    def put(self, image: _SplitImage, target: Path) -> None:
        """Make the image appear at `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):  # two entries of one file
            return
        if not self._copy:
            try:
                os.symlink(image.file.resolve(), target)
            except OSError:  # a file system or an account without links
                shutil.copyfile(image.file, target)
        else:
            shutil.copyfile(image.file, target)


def _gather(name: str, source: Source) -> tuple[_Split, list[Finding]]:
    """Check a split and put its boxes with its images."""
    content = check_content(source.content, source.place, need_boxes=True)
    findings = [*source.findings, *content.findings]
    listed, found = complete_sizes(content.images, source.image_dir, findings), content.annotations
    order = np.argsort(found.image, kind="stable")
    first = np.searchsorted(found.image[order], np.arange(len(listed.ids) + 1))
    images = []
    for i, file_name in enumerate(listed.file_names):
        file = source.image_dir / file_name
        own = order[first[i] : first[i + 1]]
        if os.path.isfile(file):
            height, width = listed.sizes[i].tolist()
            images.append(
                _SplitImage(
                    int(listed.ids[i]), PurePath(file_name).as_posix(), file, (height, width),
                    found.labels[own].tolist(), found.xywh[own].tolist(),
                    found.area[own].tolist(), found.crowd[own].tolist(),
                )
            )  # fmt: skip
    return _Split(name, content.classes.ids, content.classes.names, images), findings


def _write_coco(split: _Split, folder: Path, place: _Placer) -> list[str]:
    image_dir, annotation_file = coco_layout(folder, split.name)
    categories = zip(split.ids, split.class_names, strict=True)
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": class_name} for i, class_name in categories],
    }
    for image in split.images:
        place.put(image, image_dir / image.name)
        entry: dict[str, Any] = {"id": image.id, "file_name": image.name}
        if all(image.size):
            entry |= {"height": image.size[0], "width": image.size[1]}
        content["images"].append(entry)
        for label, box, area, crowd in zip(
            image.labels, image.xywh, image.area, image.crowd, strict=True
        ):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image.id,
                    "category_id": split.ids[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    write_atomic(annotation_file, json.dumps(content))
    return []


def _check_voc_names(names: tuple[str, ...], output_dir: Path) -> None:
    """Refuse classes that would not come back: names are all that VOC knows of them."""
    written = [name.strip() for name in names]
    for name in written:
        if written.count(name) > 1 or not name or _NOT_IN_XML.search(name):
            raise DataError(
                f"{output_dir}: expected class names that differ and that XML can hold, as VOC "
                f"knows no ids, got {name!r}. Name the classes otherwise."
            )


def _write_voc(split: _Split, folder: Path, place: _Placer, corners: str) -> list[str]:
    stems = []
    for image in split.images:
        flat = _NOT_IN_XML.sub("_", image.name.replace("/", "_"))
        name = place.free(flat, folder, split.name)
        place.put(image, folder / "JPEGImages" / name)
        stem = PurePath(name).stem
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = name
        if all(image.size):
            size = ET.SubElement(root, "size")
            for key, side in zip(("height", "width"), image.size, strict=True):
                ET.SubElement(size, key).text = str(side)
        for label, box, crowd in zip(image.labels, image.xywh, image.crowd, strict=True):
            found = ET.SubElement(root, "object")
            ET.SubElement(found, "name").text = split.class_names[label]
            ET.SubElement(found, "difficult").text = str(int(crowd))
            tags = ET.SubElement(found, "bndbox")
            for key, value in _voc_corners(box, corners):
                ET.SubElement(tags, key).text = _number(value)
        ET.indent(root)
        _write(folder / "Annotations" / f"{stem}.xml", ET.tostring(root, encoding="unicode"))
        stems.append(stem)
    lines = "".join(f"{stem}\n" for stem in stems)
    write_atomic(folder / "ImageSets" / "Main" / f"{split.name}.txt", lines)
    return []


def _voc_corners(box: list[float], corners: str) -> Iterator[tuple[str, float]]:
    """Yield the tags of a box; see `datasets.formats.voc` for the two ways to count."""
    first = 1 if corners == "pixels" else 0
    x, y, width, height = box
    yield from zip(
        ("xmin", "ymin", "xmax", "ymax"),
        (x + first, y + first, x + width, y + height),
        strict=True,
    )


def _write_yolo(split: _Split, folder: Path, place: _Placer) -> list[str]:
    crowds, outside, cut, unusable = 0, 0, 0, []
    images, labels = folder / "images" / split.name, folder / "labels" / split.name
    for image in split.images:
        header = read_header(image.file)
        if header is None:
            unusable.append(repr(image.name))
            continue
        name = place.free(image.name, images, split.name)
        place.put(image, images / name)
        lines = []
        for label, box, crowd in zip(image.labels, image.xywh, image.crowd, strict=True):
            crowds += crowd
            if not crowd:
                whole = _fractions(box, image.size, *header)
                values = _within(whole)
                if values is None:
                    outside += 1
                    continue
                cut += values != whole
                lines.append(f"{label} {' '.join(map(_number, values))}\n")
        _write((labels / name).with_suffix(".txt"), "".join(lines))
    file = folder / "data.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    content[split.name] = f"images/{split.name}"
    content["names"] = dict(enumerate(split.class_names))
    write_atomic(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    notices = []
    if crowds:
        notices.append(f"crowd boxes, which YOLO cannot mark, left out: {crowds}")
    if outside:
        notices.append(f"boxes outside their image, left out: {outside}")
    if cut:
        notices.append(f"boxes that reach past their image, cut there: {cut}")
    if unusable:
        notices.append(
            f"images that cannot be read, left out: {len(unusable)} ({first_few(unusable)})"
        )
    return notices


def _fractions(
    box: list[float], counted: tuple[int, int], stored: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """Return centre and size as fractions of the upright image.

    The box is of that image where its size is the one that counts, else of the stored pixels.
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


def _write(path: Path, text: str) -> None:
    """Write one of very many files: flushing each to the disk would take minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
