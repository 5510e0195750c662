"""`main.py convert`: a data set in another format."""

import argparse
from pathlib import Path

from configs.options import Values
from configs.schema import ConvertConfig
from datasets.build import format_options
from datasets.formats.coco import read_coco_file
from datasets.formats.convert import convert
from datasets.formats.registry import read_source
from datasets.formats.source import Source
from util.console import console
from util.errors import ConfigError


def convert_dataset(args: argparse.Namespace, given: Values) -> int:
    """Write a data set as COCO, VOC or YOLO."""
    options = ConvertConfig(**given.get("convert", {}))
    for name in ("data_path", "output_dir"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is required.")
    lines = convert(
        {split: _read(options, split) for split in options.splits},
        options.to,
        Path(options.output_dir),
        copy=options.copy_images,
        **format_options(options, options.to),
    )
    console("\n".join(lines))
    console(f"written: {options.output_dir}")
    return 0


def _read(options: ConvertConfig, split: str) -> Source:
    place = Path(options.data_path)
    if options.images and options.data_format == "coco":
        return read_coco_file(place, Path(options.images))
    reading = format_options(options, options.data_format)
    return read_source(options.data_format, place, split, **reading)
