"""Pictures without annotations, given as files, folders or patterns."""

import glob
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.coco import make_target
from datasets.image_reading import READ_ERRORS, read_rgb, read_size
from datasets.picture_files import SUFFIXES, is_picture
from datasets.sample import Sample, to_pixels
from datasets.transforms import Transform
from util.batch import Target, UnreadableImage
from util.errors import DataError


def find_pictures(inputs: Sequence[str]) -> list[Path]:
    """Return the pictures that files, folders (searched throughout) and glob patterns name.

    A file named outright is taken whatever its suffix; each picture comes once, in the order of
    `inputs` and sorted within each.

    Raises:
        DataError: an input does not exist or holds no picture.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            pictures = [path]
        elif path.is_dir():
            pictures = sorted(p for p in path.rglob("*") if is_picture(p))
        else:
            matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
            pictures = [p for p in matches if is_picture(p)]
            if not matches:
                raise DataError(
                    f"--input {text}: expected a picture, a folder or a pattern, found nothing "
                    "there. Check the path."
                )
        if not pictures:
            raise DataError(
                f"--input {text}: expected pictures ({', '.join(SUFFIXES)}), found none."
            )
        found.update(dict.fromkeys(pictures))
    return list(found)


class PictureDataset(Dataset[tuple[Tensor, Target] | UnreadableImage]):
    """Pictures turned upright, with targets that hold no boxes; `image_id` is the position."""

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths = list(paths)
        self._transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[Tensor, Target] | UnreadableImage:
        path = self.paths[position]
        try:
            image = read_rgb(path, None)
        except READ_ERRORS as error:
            return UnreadableImage(position, str(path), f"{type(error).__name__}: {error}")
        size = (image.height, image.width)
        labels = torch.zeros(0, dtype=torch.int64)
        sample = Sample(to_pixels(image), torch.zeros(0, 4), labels, size)
        generator = torch.Generator().manual_seed(position)
        prepared = self._transform(sample, generator, generator)
        return prepared.image, make_target(prepared, position, size)

    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of each picture, (0, 0) where its header cannot be read."""
        return [read_size(path, upright=True) or (0, 0) for path in self.paths]

    def output_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the size after the transform, None where it is random."""
        return self._transform.output_size(height, width)
