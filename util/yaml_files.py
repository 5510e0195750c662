"""YAML from strangers: read as data, at a size and depth that a description of options can have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from util.files import read_regular

_LARGEST = 10_000_000  # bytes
_MOST_KEYS = 100_000  # of a mapping that others are merged into
_MOST_ALIASES = 1000
_DEEPEST = 50


def _utf8(data: bytes) -> str:
    return data.decode("utf-8-sig")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # without types
    """Refuses what would grow without bound: a few lines can stand for a billion values."""

    aliases = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """See the base class."""
        self.aliases += self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.aliases > _MOST_ALIASES or self.depth > _DEEPEST:
            what = f"more than {_MOST_ALIASES} aliases, or deeper than {_DEEPEST} levels"
            raise yaml.YAMLError(what)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        """See the base class; before 6.0.3 it repeats keys that are merged again and again."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.YAMLError(f"more than {_MOST_KEYS} keys are merged")


def read_yaml(path: Path, decode: Callable[[bytes], str] = _utf8) -> Any:
    """Return the content of a YAML file; values may share parts, so copy, never walk them.

    Raises:
        OSError: it cannot be read, is not a regular file, or is too large.
        yaml.YAMLError: it is not YAML, or would grow too large.
        ValueError: `decode` cannot read it, or has a number of thousands of digits.
    """
    return yaml.load(decode(read_regular(path, _LARGEST)), Loader=_Loader)
