"""Write a data set in another format: new annotations, images linked or copied."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import numpy as np

from datasets.checks.entries import check_content
from datasets.checks.kinds import KINDS
from datasets.formats.registry import FORMATS, Placer, Source, Split, SplitImage
from datasets.images import read_header
from datasets.index import CocoIndex
from util.errors import DataError


def convert(
    sources: Mapping[str, Source],
    target: str,
    output_dir: Path,
    *,
    copy: bool,
    **options: str,
) -> list[str]:
    """Write splits in the format `target` under `output_dir`; return a line on each and its flaws.

    What the checks leave out is not written, nor are images that are not there. With `copy`, files
    that are no images are left out, too: a list may name any. `options` are those of the format.

    Raises:
        ConfigError: there is no such format, or `output_dir` cannot be made.
        DataError: `output_dir` holds something already, or a split cannot be used or has no box.
    """
    data_format = FORMATS[target]
    if os.path.exists(output_dir) and (not os.path.isdir(output_dir) or any(output_dir.iterdir())):
        raise DataError(f"{output_dir}: not a new or empty folder. Choose another.")
    indices = [
        CocoIndex.from_content(
            check_content(source, need_boxes=True),
            source.place,
            source.image_dir,
            need_boxes=False,
            every_size=True,
        )
        for source in sources.values()
    ]
    if copy:
        _refuse_links_out(indices)
    splits = [_gather(name, index, copy=copy) for name, index in zip(sources, indices, strict=True)]
    for split, index in zip(splits, indices, strict=True):
        _require_boxes(split, index)
    written = data_format.write(splits, output_dir, Placer(copy=copy), **options)
    lines = []
    for split, index, notices in zip(splits, indices, written, strict=True):
        boxes = sum(len(image.labels) for image in split.images)
        lines.append(f"{split.name}: {len(split.images)} images, {boxes} boxes")
        lines += [f"  notice: {notice}" for notice in (*index.notices, *notices)]
    return lines


def _refuse_links_out(indices: Sequence[CocoIndex]) -> None:
    """Raise DataError if an image is a link to a file outside its set, which may be any file here.

    The folder of images may be a link itself.
    """
    for index in indices:
        root = os.path.realpath(index.image_dir)
        for name in index.images.file_names:
            file = os.path.realpath(os.path.join(index.image_dir, name))
            if os.path.isfile(file) and os.path.commonpath([root, file]) != root:
                raise DataError(
                    f"{index.image_dir / name}: is a link out of the data set, to '{file}', and is "
                    "not copied. Replace it by the file, or leave out `copy_images`."
                )


def _require_boxes(split: Split, index: CocoIndex) -> None:
    """Raise DataError if there is no box and something was wrong, or there is no image.

    A set of background alone, as a test set without annotations, is written.
    """
    flaws = [f for f in index.findings if f.kind == "odd_layout" or not KINDS[f.kind].note]
    if not split.images or (flaws and not any(image.labels for image in split.images)):
        found = "; ".join(flaw.text for flaw in flaws) or "no image is there"
        raise DataError(
            f"{index.place}: nothing to write of the split '{split.name}', none of its boxes "
            f"could be read. Found: {found:.250}."
        )


def _gather(name: str, index: CocoIndex, *, copy: bool) -> Split:
    """Return a split with its boxes as in the file, of the images that are there."""
    found = index.annotations
    order = np.argsort(found.image, kind="stable")
    first = np.searchsorted(found.image[order], np.arange(len(index) + 1))
    images = []
    for i, file_name in enumerate(index.images.file_names):
        file = index.image_dir / file_name
        if not os.path.isfile(file) or (copy and read_header(file) is None):
            continue
        own = order[first[i] : first[i + 1]]
        height, width = index.images.sizes[i].tolist()
        images.append(
            SplitImage(
                int(index.images.ids[i]),
                PurePath(file_name).as_posix(),
                file,
                (height, width),
                found.labels[own].tolist(),
                found.xywh[own].tolist(),
                found.area[own].tolist(),
                found.crowd[own].tolist(),
            )
        )
    return Split(name, index.classes.ids, index.classes.names, images)
