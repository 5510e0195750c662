"""Data sets: images of an index, with targets, kept once decoded; and images alone."""

import codecs
import glob
import multiprocessing
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from datasets.class_mapping import map_used_classes
from datasets.formats.layout import files_below
from datasets.images import (
    READ_ERRORS,
    TURNED,
    is_image,
    read_header,
    read_reduced,
    read_rgb,
    unread_kinds,
)
from datasets.index import CocoIndex
from datasets.mixing import Mixing
from datasets.sample import CHANNELS, Sample, Size, clip_boxes, draw_integer, to_pixels
from datasets.transforms import Transform
from datasets.windows import Windows, open_windows
from util.batch import Target, UnreadableImage
from util.classes import Classes
from util.console import console
from util.errors import ConfigError, DataError
from util.files import read_regular

ImageSource = Path | Image.Image | Tensor
_LONGEST_LIST = 2**30  # bytes
_PATIENCE = 1.0  # seconds: a process that was killed may have held the lock of the cache


class ImageCache:
    """Images that were decoded once, as 8-bit pixels, as many as there is room for.

    Nothing is thrown out: an epoch needs each image once, so a newer one is worth no more than an
    older one. The memory is allocated at once, so that it cannot run out later, and is freed with
    the last process, however that ends.
    """

    def __init__(self, num_images: int, num_bytes: int) -> None:
        """Allocate the shared buffer.

        Raises:
            ConfigError: there is not enough memory.
        """
        try:
            # as torch's own collation does: `share_memory_` would fill as much again, and copy it
            storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ConfigError(
                f"cache_images: there are not {num_bytes / 1e9:.2f} GB of shared memory left "
                "(`df -h /dev/shm` shows it). Lower it, or give a container more."
            ) from error
        self._pixels = torch.empty(0, dtype=torch.uint8).set_(storage)
        # of each image: where it begins (-1: not here), decoded and whole (height, width)
        self._table: Tensor = torch.full((num_images, 5), -1, dtype=torch.int64)
        self._used: Tensor = torch.zeros((), dtype=torch.int64)
        for shared in (self._table, self._used):
            shared.share_memory_()  # type: ignore[no-untyped-call]
        self._lock = multiprocessing.Lock()

    def get(self, position: int) -> tuple[Tensor, Size] | None:
        """Return pixels [3,h,w] uint8, not to be written to, and the whole image's size."""
        start, h, w, height, width = self._table[position].tolist()
        if start < 0:
            return None
        stored = self._pixels[start : start + CHANNELS * h * w].view(h, w, CHANNELS)
        return stored.permute(2, 0, 1), (height, width)

    def put(self, position: int, pixels: Tensor, size: Size) -> None:
        """Keep pixels [3,h,w] uint8 of an image, if there is room."""
        _, height, width = pixels.shape
        if not self._lock.acquire(timeout=_PATIENCE):
            return
        try:
            start = int(self._used)
            if start + pixels.numel() > len(self._pixels) or int(self._table[position, 0]) >= 0:
                return
            self._used += pixels.numel()
        finally:
            self._lock.release()
        part = self._pixels[start : start + pixels.numel()]
        part.view(height, width, CHANNELS).copy_(pixels.permute(1, 2, 0))
        self._table[position, 1:] = torch.tensor([height, width, *size])
        self._table[position, 0] = start  # last: from here on others read it


class SampleKey(NamedTuple):
    """An image in the training order: its position in the index, and its batch in the epoch."""

    position: int
    batch: int


class CocoDetection(Dataset[tuple[Tensor, Target] | UnreadableImage]):
    """Images of an index, prepared by `transform`, with targets as in `util.batch.Batch`.

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
        cache: ImageCache | None = None,
    ) -> None:
        """Take labels from the index, or from `classes`, the label space of a checkpoint.

        Raises:
            DataError: `classes` lacks a class that annotations of the data have, or all classes.
        """
        self.index = index
        self.classes = index.classes if classes is None else classes
        used = {index.classes.ids[i] for i in np.unique(index.annotations.labels).tolist()}
        mapping = map_used_classes(index.classes, self.classes, used)
        self._label_of = np.array([mapping.get(i, -1) for i in index.classes.ids], dtype=np.int64)
        self.label_to_category = {label: category for category, label in mapping.items()}
        self.unknown_classes = [
            name
            for i, name in zip(index.classes.ids, index.classes.names, strict=True)
            if i not in mapping
        ]
        self.transform = transform
        self._mixing = mixing
        self._cache = cache
        self._seed = seed
        # Shared memory: worker processes that outlive an epoch see the next one.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._mixed_epochs = torch.full((), sys.maxsize)
        self._mixed_epochs.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: "int | SampleKey") -> tuple[Tensor, Target] | UnreadableImage:
        position, batch = key if isinstance(key, SampleKey) else (key, 0)
        image_id = self.image_id(position)
        try:
            sample = self._read_sample(position)
        except READ_ERRORS as error:
            return unreadable(image_id, self.path(position), error)
        epoch = int(self._epoch)
        generator = seeded_generator(self._seed, epoch, position)
        size = sample.size
        if self._mixing is not None and epoch < int(self._mixed_epochs):
            sample = self._mixing(sample, epoch, self._draw_sample, generator)
        shared = seeded_generator(self._seed, epoch, batch, 1)
        prepared = self.transform.in_epoch(epoch)(sample, generator, shared)
        return prepared.image, make_target(prepared, image_id, size)

    def image_id(self, position: int) -> int:
        """Return the id of an image."""
        return int(self.index.images.ids[position])

    def windows(self, position: int) -> AbstractContextManager[Windows]:
        """Open an image to read parts of it; see `open_windows`."""
        height, width = self.index.images.sizes[position].tolist()
        return open_windows(self.path(position), (height, width))

    def objects(self, position: int) -> tuple[Tensor, Tensor]:
        """Return the boxes [B,4] xyxy of an image in pixels, and their labels [B]."""
        part = slice(self.index.first[position], self.index.first[position + 1])
        boxes = torch.from_numpy(self.index.boxes[part].copy())
        return boxes, torch.from_numpy(self._label_of[self.index.labels[part]])

    def read_image(self, image_id: int) -> Image.Image | None:
        """Return an image as it is stored, None if it cannot be read."""
        position = int(np.flatnonzero(self.index.images.ids == image_id)[0])
        height, width = self.index.images.sizes[position].tolist()
        try:
            return read_rgb(self.path(position), (height, width))
        except READ_ERRORS:
            return None

    def set_epoch(self, epoch: int) -> None:
        """Draw new augmentation; call it before the loader is iterated."""
        self._epoch.fill_(epoch)

    def mix_until(self, epoch: int) -> None:
        """Mix images in the epochs before this one; call it between two epochs."""
        self._mixed_epochs.fill_(epoch)

    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of each image, (0, 0) where it is unknown."""
        return [(int(h), int(w)) for h, w in self.index.images.sizes]

    def path(self, position: int) -> Path:
        """Return where an image is."""
        return self.index.image_dir / self.index.images.file_names[position]

    def _read_sample(self, position: int) -> Sample:
        """Decode an image, at no more than the transform needs, with its boxes."""
        pixels, size = self._decode(position)
        # The file may be smaller than stated.
        return clip_boxes(Sample(pixels, *self.objects(position), size))

    def _decode(self, position: int) -> tuple[Tensor, tuple[int, int]]:
        """Return pixels as `read_reduced` decodes them, or from the cache."""
        cached = None if self._cache is None else self._cache.get(position)
        if cached is not None:
            return cached
        height, width = self.index.images.sizes[position].tolist()
        image, size = read_reduced(
            self.path(position), (height, width), self.transform.decoded_size
        )
        pixels = to_pixels(image)
        if self._cache is not None:
            self._cache.put(position, pixels, size)
        return pixels, size

    def _draw_sample(self, generator: torch.Generator) -> Sample | None:
        """Return any image of the set, None if the one drawn cannot be read."""
        try:
            return self._read_sample(draw_integer(0, len(self) - 1, generator))
        except READ_ERRORS:
            return None


def make_target(prepared: Sample, image_id: int, orig_size: tuple[int, int]) -> Target:
    """Return the target of a prepared image; see `util.batch.Batch` for its entries."""
    height, width = prepared.image.shape[-2:]
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    return {
        "image_id": torch.tensor(image_id, dtype=torch.int64),
        "labels": prepared.labels,
        "boxes": box_convert(prepared.boxes / scale, "xyxy", "cxcywh"),
        "orig_size": torch.tensor(orig_size, dtype=torch.int64),
        "size": torch.tensor([height, width], dtype=torch.int64),
    }


def unreadable(image_id: int, path: Path | str, error: BaseException) -> UnreadableImage:
    """Return what stands in a batch for an image that cannot be read."""
    return UnreadableImage(image_id, str(path), f"{type(error).__name__}: {error}")


def seeded_generator(*key: int) -> torch.Generator:
    """Return a generator whose stream depends on all numbers of `key` (non-negative)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the images that files, folders (with all in them), glob patterns and lists name.

    A list is a .txt file, or the standard input for `-`; see `_listed`. Another file named outright
    is taken whatever its suffix. Each image comes once, in the order of `inputs`, sorted within
    folders and patterns.

    Raises:
        DataError: an input does not exist or holds no image.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if text == "-" or (path.suffix.lower() == ".txt" and os.path.isfile(path)):
            images = _listed(text)
        elif os.path.isfile(path):
            images = [path]
        elif os.path.isdir(path):
            images = _images_among(sorted(files_below(path)), text)
        else:
            matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
            if not matches:
                raise DataError(
                    f"`input {text}`: no image, folder or pattern leads to a file. Check the path."
                )
            images = _images_among(matches, text)
        if not images:
            raise DataError(f"`input {text}`: there are no images there. Check the path.")
        found.update(dict.fromkeys(images))
    return list(found)


def _images_among(paths: Sequence[Path], text: str) -> list[Path]:
    """Return those that are images, and report those that are images of kinds not read.

    Raises:
        DataError: there are no others.
    """
    images = [path for path in paths if is_image(path)]
    unread = unread_kinds(paths)
    if unread and not images:
        raise DataError(
            f"`input {text}`: its images are of kinds that are not read: {unread}. Convert them to "
            "JPEG or PNG."
        )
    if unread:
        console(f"notice: `input {text}`: skips images of kinds that are not read: {unread}")
    return images


def _listed(text: str) -> list[Path]:
    """Return the files that a list names, one a line; `-` stands for the standard input.

    A relative name is looked for from the working folder, then from that of the list. What is not
    there is an image that cannot be read, like any other.

    Raises:
        DataError: the list cannot be read, or a line is no name.
    """
    try:
        if text == "-":
            content = sys.stdin.buffer.read(_LONGEST_LIST)
        else:
            content = read_regular(Path(text), _LONGEST_LIST)
    except OSError as error:
        raise DataError(
            f"`input {text}`: cannot be read ({error.strerror}). Check the path."
        ) from None
    folder = Path() if text == "-" else Path(text).parent
    paths = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if b"\0" in line:
            raise DataError(f"`input {text}`: line {number} is no name. Give an image a line.")
        if line.strip():
            path = Path(os.fsdecode(line))
            beside = folder / path
            paths.append(beside if not os.path.exists(path) and os.path.exists(beside) else path)
    return paths


class ImageList(Dataset[tuple[Tensor, Target] | UnreadableImage]):
    """Images to predict on, with targets that hold no boxes; `image_id` is the position.

    Files and Pillow images are turned upright; a tensor is uint8 [3,H,W] RGB as it is.
    """

    def __init__(self, images: Sequence[ImageSource], transform: Transform) -> None:
        self._images = list(images)
        self.transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> tuple[Tensor, Target] | UnreadableImage:
        source = self._images[position]
        try:
            pixels = source if isinstance(source, Tensor) else to_pixels(read_rgb(source, None))
        except READ_ERRORS as error:
            return unreadable(position, self.path(position), error)
        size = (pixels.shape[1], pixels.shape[2])
        sample = Sample(pixels, *self.objects(position), size)
        generator = torch.Generator().manual_seed(position)
        prepared = self.transform(sample, generator, generator)
        return prepared.image, make_target(prepared, position, size)

    def image_id(self, position: int) -> int:
        """Return the id of an image, which is its position."""
        return position

    def windows(self, position: int) -> AbstractContextManager[Windows]:
        """Open an image to read parts of it; see `open_windows`."""
        return open_windows(self._images[position], None)

    def objects(self, position: int) -> tuple[Tensor, Tensor]:
        """Return no boxes [0,4], and no labels [0]."""
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)

    def path(self, position: int) -> Path | str:
        """Return where an image comes from, "" where that is not known."""
        source = self._images[position]
        return source if isinstance(source, Path) else getattr(source, "filename", "")

    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of each image, (0, 0) where its header cannot be read."""
        return [_upright_size(source) for source in self._images]


def _upright_size(source: ImageSource) -> tuple[int, int]:
    if isinstance(source, Tensor):
        return source.shape[1], source.shape[2]
    size, orientation = read_header(source) or ((0, 0), 1)
    return size[::-1] if orientation in TURNED else size
