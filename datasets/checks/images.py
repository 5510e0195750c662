"""What an index asks of the image folder: which files are there, and how large they are."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Annotations, Images
from datasets.checks.coco_json import box_finding
from datasets.checks.findings import NAMED, Finding, first_few
from datasets.images import read_size
from util.errors import DataError

_FEW = 9  # boxes past their images that say nothing of the layout
_SIZES_CHECKED = 100  # images whose stated size is compared with the file when an index is made


def complete_sizes(images: Images, image_dir: Path, findings: list[Finding]) -> Images:
    """Check that the images are there, and read the sizes that the file does not state.

    Raises:
        DataError: none of the images is there.
    """
    missing = _missing(images.file_names, image_dir)
    if len(missing) == len(images.ids):
        first = images.file_names[0]
        advice = "Write / where it has \\." if "\\" in first else "Check the image folder."
        raise DataError(
            f"{_one_line(image_dir / first):.400}: expected an image, found none; the same for "
            f"all {len(images.ids)} of the annotation file. {advice}"
        )
    if missing:
        names = first_few([repr(images.file_names[i]) for i in missing[:NAMED]], len(missing))
        line = (
            f"images not in the folder: {len(missing)} of {len(images.ids)}, not trained on, "
            f"missed in evaluation ({names})"
        )
        findings.append(Finding("missing_image", len(missing), line, "image", images.ids[missing]))
    present = np.setdiff1d(np.arange(len(images.ids)), missing)
    stated = np.asarray(images.sizes.all(axis=1))
    sizes = images.sizes.copy()
    unstated = present[~stated[present]]
    for i in unstated:
        sizes[i] = read_size(image_dir / images.file_names[i], upright=False) or (0, 0)
    known = np.asarray(sizes[unstated].all(axis=1))
    for kind, text, chosen in (
        ("size_not_stated", "images without width and height, read from the files", known),
        ("unreadable_image", "images that cannot be read, not trained on", ~known),
    ):
        ids = images.ids[unstated[chosen]]
        if len(ids):
            findings.append(Finding(kind, len(ids), f"{text}: {len(ids)}", "image", ids))
    _compare_sizes(images, present[stated[present]], image_dir, findings)
    return Images(images.ids, images.file_names, sizes)


def _compare_sizes(
    images: Images, present: NDArray[np.int64], image_dir: Path, findings: list[Finding]
) -> None:
    """Compare the sizes stated with the files', for some images spread over the set."""
    chosen = present[:: max(1, len(present) // _SIZES_CHECKED)]
    wrong = []
    for i in chosen:
        path, stated = image_dir / images.file_names[i], tuple(images.sizes[i].tolist())
        true = {read_size(path, upright=upright) for upright in (False, True)}
        if true != {None} and stated not in true:
            wrong.append(i)
    if wrong:
        names = first_few([repr(images.file_names[i]) for i in wrong[:NAMED]], len(wrong))
        line = (
            f"width and height other than the image file's: {len(wrong)} of {len(chosen)} "
            f"checked ({names}); the file's size is used"
        )
        findings.append(Finding("other_size", len(wrong), line, "image", images.ids[wrong]))


def _missing(file_names: Iterable[str], image_dir: Path) -> list[int]:
    """Return the positions of names without a file, listing each folder once."""
    by_folder: dict[PurePath, list[tuple[int, str]]] = defaultdict(list)
    for i, name in enumerate(file_names):
        path = PurePath(name)
        by_folder[path.parent].append((i, path.name))
    missing = []
    for folder, images in by_folder.items():
        there = _files(image_dir / folder)
        missing += [i for i, name in images if name not in there]
    return sorted(missing)


def _files(folder: Path) -> set[str]:
    """Return the names of the files in a folder; a link counts if it leads to one.

    The listing tells files apart without asking for each, which takes minutes on some networks.
    """
    try:
        with os.scandir(folder) as entries:
            return {
                entry.name for entry in entries
                if entry.is_file(follow_symlinks=False)
                or (entry.is_symlink() and os.path.isfile(entry.path))
            }  # fmt: skip
    except (OSError, ValueError):  # no folder, or none that could have this name
        return set()


def clip_to_images(
    annotations: Annotations, images: Images, findings: list[Finding]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the boxes clipped to their images [A,4] xyxy and which of them train [A]."""
    size = images.sizes[annotations.image][:, ::-1].astype(np.float64)
    bound = np.where(size > 0, size, np.inf)
    low, high = annotations.xywh[:, :2], annotations.xywh[:, :2] + annotations.xywh[:, 2:]
    boxes = np.concatenate([np.clip(low, 0, bound), np.clip(high, 0, bound)], axis=1)
    boxes32 = boxes.astype(np.float32)
    inside = np.asarray((boxes32[:, 2:] > boxes32[:, :2]).all(axis=1))
    past = inside & np.asarray(((low < -1) | (high > bound + 1)).any(axis=1))
    many = past.sum() > max(_FEW, len(past) / 4)
    doubt = " (so many may be corners or centres: `main.py check` tells)" if many else ""
    for kind, text, chosen in (
        ("outside_bbox", "bbox outside its image, not trained on", ~inside),
        ("clipped_bbox", f"bbox reaches past its image, clipped{doubt}", past),
    ):
        findings += box_finding(kind, text, annotations, images, chosen & ~annotations.crowd)
    return boxes32, inside & ~annotations.crowd


def _one_line(path: Path) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
