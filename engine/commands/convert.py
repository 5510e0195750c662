"""`main.py convert`: a data set in another format."""

import argparse
from pathlib import Path

from configs.options import Values
from configs.schema import ConvertConfig
from datasets.formats.convert import convert
from datasets.formats.sources import read_source
from util.console import console
from util.errors import ConfigError


def convert_dataset(args: argparse.Namespace, given: Values) -> int:
    """Write a data set as COCO, VOC or YOLO."""
    options = ConvertConfig(**given.get("convert", {}))
    for name in ("data_path", "output_dir"):
        if not getattr(options, name):
            raise ConfigError(f"--{name}: expected a value, got none. Give one.")
    sources = {
        split: read_source(
            options.data_format,
            Path(options.data_path),
            split,
            image_dir=Path(options.images) if options.images else None,
            voc_corners=options.voc_corners,
        )
        for split in options.splits
    }
    lines = convert(
        sources,
        options.to,
        Path(options.output_dir),
        copy=options.copy_images,
        voc_corners=options.voc_corners,
    )
    console("\n".join(lines))
    console(f"written: {options.output_dir}")
    return 0
