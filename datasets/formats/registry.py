"""The data formats. Add one: a file with a `FORMAT`, and its line here."""

from importlib import import_module
from pathlib import Path

from datasets.formats.format import Format
from datasets.formats.source import Source
from util.errors import ConfigError, nearest_hint

FORMATS = {
    "coco": ".coco",
    "voc": ".voc",
    "yolo": ".yolo",
}


def get_format(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in FORMATS:
        raise ConfigError(f"data_format {name}: no such format. {nearest_hint(name, FORMATS)}")
    found: Format = import_module(FORMATS[name], __package__).FORMAT
    return found


def read_source(data_format: str, place: Path, split: str, **options: str) -> Source:
    """Read a split of a data set; `place` is its folder, or what else the format takes.

    Raises:
        ConfigError: there is no such format.
        DataError: what describes the set is missing or cannot be read.
    """
    return get_format(data_format).read(place, split, **options)
