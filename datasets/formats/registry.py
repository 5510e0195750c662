"""The data formats by name. Add one: a file that registers it, and the file's line here."""

from pathlib import Path

from datasets.formats.format import Format, Source
from util.registry import Registry

FORMATS: Registry[Format] = Registry(
    "data_format",
    __package__,
    {
        "coco": ".coco",
        "voc": ".voc",
        "yolo": ".yolo",
    },
)


def read_source(data_format: str, place: Path, split: str, **options: str) -> Source:
    """Read a split of a data set; `place` is its folder, or what else the format takes.

    Raises:
        ConfigError: there is no such format.
        DataError: what describes the set is missing or cannot be read.
    """
    return FORMATS[data_format].read(place, split, **options)
