"""Logs of JSON lines, read as a killed process or a full disk may have left them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from util.files import open_regular


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line that holds a JSON object, without its end, and the object.

    All others are skipped: a kill in the middle of a write leaves half a line.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        for data in file:
            line = data.decode("utf-8", "replace").strip()
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, a number too long, lists too deep
                continue
            if isinstance(entry, dict):
                yield line, entry
