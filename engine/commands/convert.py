"""`main.py convert`: a data set in another format."""

from dataclasses import dataclass, replace
from pathlib import Path

from configs.options import option
from configs.schema import AnnotationOptions
from datasets.build import format_options, reading_of
from datasets.formats.coco import read_coco_file
from datasets.formats.convert import convert
from datasets.formats.detect import AUTO, locate
from datasets.formats.registry import FORMATS
from datasets.images import limit_pixels
from util.console import console
from util.errors import ConfigError, nearest_hint

_NAMES = ", ".join(FORMATS)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(AnnotationOptions):
    """What `convert` reads and writes."""

    data_format: str = option(
        AUTO, f"format of --data_path: {_NAMES}; auto: what the folder holds", alias="from"
    )
    to: str = option("coco", f"format to write: {_NAMES}, but for labelme, which is only read")
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
        None,
        "pixels of the largest image that is read (default: Pillow's 89478485)",
        low=1,
        rare=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images and len(self.splits) != 1:
            raise ConfigError("images: needs exactly one split with it, as in `splits train`.")
        if self.images and self.data_format not in ("coco", AUTO):
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
    writing = format_options(options, options.to)
    if options.images:
        sources = {split: read_coco_file(place, Path(options.images)) for split in options.splits}
    else:
        located = locate(place, options.data_format)
        reading = format_options(options, located.data_format)
        sources = {split: located.read(split, **reading) for split in options.splits}
    meaning = reading_of(options)
    sources = {split: replace(source, reading=meaning) for split, source in sources.items()}
    lines = convert(
        sources,
        options.to,
        Path(options.output_dir),
        copy=options.copy_images,
        **writing,
    )
    console("\n".join([*lines, f"written: {options.output_dir}"]))
    return 0
