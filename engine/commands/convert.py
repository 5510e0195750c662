"""`main.py convert`: a data set in another format."""

from dataclasses import dataclass, replace
from pathlib import Path

from configs.options import option
from configs.schema import AnnotationOptions
from datasets.build import format_options, reading_of
from datasets.formats.coco import read_coco_file
from datasets.formats.convert import convert
from datasets.formats.registry import FORMATS, read_source
from datasets.images import limit_pixels
from util.console import console
from util.errors import ConfigError, nearest_hint

_NAMES = ", ".join(FORMATS)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(AnnotationOptions):
    """What `convert` reads and writes."""

    data_format: str = option("coco", f"format of --data_path: {_NAMES}", alias="from")
    to: str = option("coco", f"format to write: {_NAMES}")
    data_path: str = option(
        "", "folder of the data set; for yolo also data.yaml, for coco a JSON file with --images"
    )
    images: str = option("", "folder of the images of a COCO-format JSON file")
    splits: tuple[str, ...] = option(("train", "val"), "splits to write")
    output_dir: str = option("", "a new or empty folder")
    copy_images: bool = option(
        False, "copy the images instead of linking to them", alias="copy_pictures"
    )

    max_pixels: int | None = option(
        None, "pixels of the largest image that is read (default: Pillow's 89478485)", low=1,
        rare=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images and len(self.splits) != 1:
            raise ConfigError("images: needs exactly one split with it, as in `splits train`.")
        if self.images and self.data_format != "coco":
            raise ConfigError(f"images: has no effect on {self.data_format} data. Leave it out.")
        if self.to not in FORMATS:
            raise ConfigError(f"to {self.to}: does not exist. {nearest_hint(self.to, [*FORMATS])}")


SECTIONS = {"convert": ConvertOptions}


def main(options: ConvertOptions) -> int:
    """Write a data set as COCO, VOC or YOLO."""
    for name in ("data_path", "output_dir"):
        if not getattr(options, name):
            raise ConfigError(f"{name}: is missing. Add it.")
    limit_pixels(options.max_pixels)
    place = Path(options.data_path)
    reading = format_options(options, options.data_format)
    writing = format_options(options, options.to)
    meaning = reading_of(options)
    sources = {
        split: replace(
            read_coco_file(place, Path(options.images))
            if options.images
            else read_source(options.data_format, place, split, **reading),
            reading=meaning,
        )
        for split in options.splits
    }
    lines = convert(
        sources,
        options.to,
        Path(options.output_dir),
        copy=options.copy_images,
        **writing,
    )
    console("\n".join([*lines, f"written: {options.output_dir}"]))
    return 0
