"""A split of a data set of any format, as the content of a COCO-format file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.checks.findings import Finding


@dataclass(frozen=True)
class Source:
    """A split of a data set, not checked: flaws of its entries stay as they are.

    `content` is what a COCO-format file holds, its file names relative to `image_dir`; `place` is
    the file or folder to name in messages. `findings` are what could not be read at all, by kind.
    """

    content: dict[str, Any]
    image_dir: Path
    place: Path
    findings: Mapping[str, Sequence[Finding]] = field(default_factory=dict)
