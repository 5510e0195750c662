"""Progress bars on a terminal, and lines in place of them in a file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from util.progress_lines import ProgressLines


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    done: int = 0,
    unit: str,
    description: str = "",
    enabled: bool = True,
    leave: bool = False,
) -> "tqdm[Any]":
    """Return a bar over an iterable, or over what `update` counts: on a terminal or in a notebook.

    In a file a bar would be one endless line, so lines are logged now and then in place of it.
    """
    bars = sys.stderr.isatty() or "ipykernel" in sys.modules
    kind: Any = tqdm if bars else ProgressLines
    bar: tqdm[Any] = kind(
        iterable,
        total=total,
        initial=done,
        unit=unit,
        desc=description or None,
        dynamic_ncols=True,
        leave=leave,
        disable=not enabled,
    )
    return bar
