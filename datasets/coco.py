"""Detection data of any format: the index of a checked split, and the data set that reads it."""

import contextlib
import io
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from datasets.class_mapping import map_used_classes
from datasets.coco_json import Annotations, CocoContent, Images, check_content
from datasets.findings import Finding
from datasets.image_reading import READ_ERRORS, read_reduced, read_rgb
from datasets.index_cache import read_content
from datasets.mixing import Mixing
from datasets.picture_cache import PictureCache
from datasets.picture_checks import clip_to_pictures, complete_sizes
from datasets.sample import Prepared, Sample, clip_boxes, draw_integer, to_pixels
from datasets.sources import Source, require_folder
from datasets.transforms import Transform
from util.batch import Target, UnreadableImage
from util.box_ops import xyxy_to_cxcywh
from util.classes import Classes
from util.errors import DataError

_CLASSES_SHOWN = 12


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """A split of a data set of any format, checked, in flat arrays.

    `annotations` are those that evaluation counts, as in the file. Training uses a part of them,
    clipped: picture i has `boxes[first[i]:first[i + 1]]` ([B,4] xyxy pixels) with `labels` [B].
    `findings` tell everything that was repaired or left out; `place` is where the data came from.
    """

    place: Path
    image_dir: Path
    classes: Classes
    images: Images
    annotations: Annotations
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    first: NDArray[np.int64]
    findings: tuple[Finding, ...]

    @classmethod
    def load(
        cls, json_path: Path, image_dir: Path, *, need_boxes: bool, cache: bool = False
    ) -> "CocoIndex":
        """Read and check a COCO-format file and the folder of its pictures.

        With `cache`, the content of a large file is kept for the next time.

        Raises:
            DataError: see `require_folder`, `read_content` and `from_content`.
        """
        require_folder(image_dir)
        content = read_content(json_path, need_boxes=need_boxes, cache=cache)
        return cls.from_content(content, json_path, image_dir, need_boxes=need_boxes)

    @classmethod
    def from_source(cls, source: Source, *, need_boxes: bool) -> "CocoIndex":
        """Check what was read of a data set, and its pictures.

        Without `need_boxes` there may be no annotations (as test-dev has none).

        Raises:
            DataError: see `check_content` and `from_content`.
        """
        content = check_content(source.content, source.place, need_boxes=need_boxes)
        content = replace(content, findings=(*source.findings, *content.findings))
        return cls.from_content(content, source.place, source.image_dir, need_boxes=need_boxes)

    @classmethod
    def from_content(
        cls, content: CocoContent, place: Path, image_dir: Path, *, need_boxes: bool
    ) -> "CocoIndex":
        """Check content against the pictures.

        Raises:
            DataError: none of the pictures is in the folder, or there is no box to train on where
                `need_boxes`.
        """
        findings = list(content.findings)
        images = complete_sizes(content.images, image_dir, findings)
        boxes, usable = clip_to_pictures(content.annotations, images, findings)
        if need_boxes and not usable.any():
            noticed = "; ".join(finding.text for finding in findings)
            raise DataError(
                f"{place}: expected at least one usable box, got none among "
                f"{len(content.annotations.ids)} annotations. "
                + (f"Noticed: {noticed}." if findings else "Give another file.")
            )
        image = content.annotations.image[usable]
        order = np.argsort(image, kind="stable")
        first = np.searchsorted(image[order], np.arange(len(images.ids) + 1))
        empty = images.ids[np.diff(first) == 0]
        if len(empty) and len(content.annotations.ids):  # test-dev has none
            line = f"pictures without boxes: {len(empty)} of {len(images.ids)}, kept"
            findings.append(Finding("no_boxes", len(empty), line, "image", empty))
        return cls(
            place=place,
            image_dir=image_dir,
            classes=content.classes,
            images=images,
            annotations=content.annotations,
            boxes=boxes[usable][order],
            labels=content.annotations.labels[usable][order],
            first=first,
            findings=tuple(findings),
        )

    def __len__(self) -> int:
        return len(self.images.ids)

    @property
    def notices(self) -> list[str]:
        """A line on each kind of thing that was repaired or left out."""
        return [finding.text for finding in self.findings]

    @property
    def boxes_per_picture(self) -> NDArray[np.int64]:
        """Usable boxes of each picture."""
        return np.diff(self.first)

    @cached_property
    def coco_gt(self) -> COCO:
        """The ground truth for pycocotools."""
        return to_pycocotools(self)

    def report(self, num_queries: int) -> str:
        """Return the summary and a line on everything that was mended or will not be found."""
        notices = self.notices
        crowded = self.boxes_per_picture > num_queries
        if crowded.any():
            notices.append(
                f"{int(crowded.sum())} pictures have more boxes (up to "
                f"{int(self.boxes_per_picture.max())}) than the model has queries "
                f"({num_queries}): the rest can never be found. Raise --num_queries."
            )
        return "\n".join([self.summary(), *(f"  notice: {notice}" for notice in notices)])

    def data_report(self) -> dict[str, Any]:
        """Return what was repaired or left out, in plain values, with the ids of each kind."""
        return {
            "place": str(self.place),
            "images": len(self),
            "boxes": len(self.boxes),
            "findings": [finding.to_json() for finding in self.findings],
        }

    def summary(self) -> str:
        """Return a line of counts and a line with the boxes of each class, most frequent first."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        shown = [f"{self.classes.names[k]} {counts[k]}" for k in order[:_CLASSES_SHOWN]]
        rest = len(self.classes) - len(shown)
        more = [f"{rest} more with {counts[order[_CLASSES_SHOWN:]].sum()}"] if rest else []
        return (
            f"{self.place.name}: {len(self)} images, {len(self.boxes)} boxes, "
            f"{int((self.boxes_per_picture == 0).sum())} images without boxes, "
            f"{int(self.annotations.crowd.sum())} crowd boxes, {len(self.classes)} classes\n"
            f"  boxes by class: {', '.join([*shown, *more])}"
        )


def to_pycocotools(data: CocoContent | CocoIndex) -> COCO:
    """Return checked annotations for pycocotools, with areas and crowd flags filled in.

    They are numbered from 1: pycocotools takes an id of 0 for "no match".
    """
    found, ids = data.annotations, data.classes.ids
    annotations: list[dict[str, Any]] = [
        {
            "id": number + 1,
            "image_id": int(data.images.ids[found.image[number]]),
            "category_id": ids[found.labels[number]],
            "bbox": found.xywh[number].tolist(),
            "area": float(found.area[number]),
            "iscrowd": int(found.crowd[number]),
        }
        for number in range(len(found.ids))
    ]
    images = [
        {"id": int(i), "file_name": name, "height": int(height), "width": int(width)}
        for i, name, (height, width) in zip(
            data.images.ids, data.images.file_names, data.images.sizes, strict=True
        )
    ]
    categories = [{"id": i, "name": name} for i, name in zip(ids, data.classes.names, strict=True)]
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class Turn(NamedTuple):
    """A picture in the training order: its position in the index, and its batch in the epoch."""

    position: int
    batch: int


class CocoDetection(Dataset[tuple[Tensor, Target] | UnreadableImage]):
    """Pictures of an index, prepared by `transform`, with targets as in `util.batch.Batch`.

    What the transform draws depends on (seed, epoch, position) alone, or for what a batch shares on
    (seed, epoch, batch); not on worker processes.
    """

    def __init__(
        self,
        index: CocoIndex,
        transform: Transform,
        *,
        seed: int = 0,
        classes: Classes | None = None,
        mixing: Mixing | None = None,
        cache: PictureCache | None = None,
    ) -> None:
        """Take labels from the index, or from `classes`, the label space of a checkpoint.

        Raises:
            DataError: `classes` lacks a class that annotations of the data have, or all classes.
        """
        self.index = index
        self.classes = index.classes if classes is None else classes
        annotated = np.unique(index.annotations.labels).tolist()
        used = {index.classes.ids[label] for label in annotated}
        mapping = map_used_classes(index.classes, self.classes, used)
        self._label_of = np.array([mapping.get(i, -1) for i in index.classes.ids], dtype=np.int64)
        self.label_to_category = {label: category for category, label in mapping.items()}
        self.unknown_classes = [
            name
            for i, name in zip(index.classes.ids, index.classes.names, strict=True)
            if i not in mapping
        ]
        self._transform = transform
        self._mixing = mixing
        self._cache = cache
        self._seed = seed
        # Shared memory: worker processes that outlive an epoch see the next one.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, turn: "int | Turn") -> tuple[Tensor, Target] | UnreadableImage:
        position, batch = turn if isinstance(turn, Turn) else (turn, 0)
        image_id = int(self.index.images.ids[position])
        try:
            sample = self._read_sample(position)
        except READ_ERRORS as error:
            path = str(self._path(position))
            return UnreadableImage(image_id, path, f"{type(error).__name__}: {error}")
        epoch = int(self._epoch)
        generator = seeded_generator(self._seed, epoch, position)
        of_batch = seeded_generator(self._seed, epoch, batch, 1)
        mixed = sample
        if self._mixing is not None:
            mixed = self._mixing(sample, epoch, self._draw_sample, generator)
        prepared = self._transform(mixed, generator, of_batch)
        return prepared.image, make_target(prepared, image_id, sample.size)

    def read_picture(self, image_id: int) -> Image.Image | None:
        """Return a picture as it is stored, None if it cannot be read."""
        position = int(np.flatnonzero(self.index.images.ids == image_id)[0])
        height, width = self.index.images.sizes[position].tolist()
        try:
            return read_rgb(self._path(position), (height, width))
        except READ_ERRORS:
            return None

    def set_epoch(self, epoch: int) -> None:
        """Draw augmentation anew; call it before the loader is iterated."""
        self._epoch.fill_(epoch)

    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of each picture, (0, 0) where it is unknown."""
        return [(int(h), int(w)) for h, w in self.index.images.sizes]

    def output_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the size after the transform, None where it is random."""
        return self._transform.output_size(height, width)

    def largest_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the most that a picture of this size may get to be, None where it is unknown."""
        return self._transform.largest_size(height, width) if height and width else None

    def _path(self, position: int) -> Path:
        return self.index.image_dir / self.index.images.file_names[position]

    def _read_sample(self, position: int) -> Sample:
        """Decode a picture, at no more than the transform needs, with its boxes."""
        pixels, size = self._decode(position)
        part = slice(self.index.first[position], self.index.first[position + 1])
        boxes = torch.from_numpy(self.index.boxes[part].copy())
        labels = torch.from_numpy(self._label_of[self.index.labels[part]])
        # The file may be smaller than it was said to be.
        return clip_boxes(Sample(pixels, boxes, labels, size))

    def _decode(self, position: int) -> tuple[Tensor, tuple[int, int]]:
        """Return pixels as `read_reduced` decodes them, or from the cache."""
        cached = None if self._cache is None else self._cache.get(position)
        if cached is not None:
            return cached
        height, width = self.index.images.sizes[position].tolist()
        picture, size = read_reduced(
            self._path(position), (height, width), self._transform.decoded_size
        )
        pixels = to_pixels(picture)
        if self._cache is not None:
            self._cache.put(position, pixels, size)
        return pixels, size

    def _draw_sample(self, generator: torch.Generator) -> Sample | None:
        """Return any picture of the set, None if the one drawn cannot be read."""
        try:
            return self._read_sample(draw_integer(0, len(self) - 1, generator))
        except READ_ERRORS:
            return None


def make_target(prepared: Prepared, image_id: int, orig_size: tuple[int, int]) -> Target:
    """Return the target of a prepared picture; see `util.batch.Batch` for its entries."""
    height, width = prepared.image.shape[-2:]
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    return {
        "image_id": torch.tensor(image_id, dtype=torch.int64),
        "labels": prepared.labels,
        "boxes": xyxy_to_cxcywh(prepared.boxes / scale),
        "orig_size": torch.tensor(orig_size, dtype=torch.int64),
        "size": torch.tensor([height, width], dtype=torch.int64),
    }


def seeded_generator(*key: int) -> torch.Generator:
    """Return a generator whose stream depends on all numbers of `key` (non-negative)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
