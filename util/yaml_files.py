"""YAML from strangers: read as data, at a size and depth that a description of options can have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from util.files import read_regular

_LARGEST = 5_000_000  # bytes
_MOST_KEYS = 100_000  # of a mapping that others are merged into
_MOST_ALIASES = 1000
_DEEPEST = 50
_MOST_NODES = 100_000  # which take two seconds and 100 MB
_MOST_DIGITS = 4000  # of a whole number: Python refuses to write longer ones in a message


def _utf8(data: bytes) -> str:
    return data.decode("utf-8-sig")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # without types
    """Refuses what would grow without bound: a few lines can stand for a billion values."""

    aliases = depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """See the base class."""
        self.aliases += self.check_event(yaml.AliasEvent)
        self.depth += 1
        self.nodes += 1
        if self.aliases > _MOST_ALIASES or self.depth > _DEEPEST or self.nodes > _MOST_NODES:
            raise yaml.YAMLError(
                f"more than {_MOST_NODES} values or {_MOST_ALIASES} aliases, or deeper than "
                f"{_DEEPEST} levels"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        """See the base class; before 6.0.3 it repeats keys that are merged again and again."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.YAMLError(f"more than {_MOST_KEYS} keys are merged")

    def construct_yaml_int(self, node: Any) -> int:
        """See the base class."""
        if len(node.value) > _MOST_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value)} digits")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path, decode: Callable[[bytes], str] = _utf8) -> Any:
    """Return the content of a YAML file; values may share parts, so copy, never walk them.

    Raises:
        OSError: it cannot be read, is not a regular file, or is too large.
        yaml.YAMLError: it is not YAML, or would grow too large.
        ValueError: `decode` cannot read it, or has a number of thousands of digits.
    """
    return yaml.load(decode(read_regular(path, _LARGEST)), Loader=_Loader)
