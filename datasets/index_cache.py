"""Keep what was read of a large COCO-format file, so that the next run need not read it again.

A file in the user's cache folder is named by a hash of the JSON's bytes and starts with a hash of
its own content: one that is damaged, half written or of other data is never used. Nothing is
written next to the data.
"""

import contextlib
import hashlib
import io
import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np

from datasets.arrays import Annotations, Images, Names
from datasets.checks.entries import CocoContent, check_content
from datasets.checks.findings import Notice
from datasets.formats.coco import parse_json, read_bytes
from datasets.formats.format import Source
from util.classes import Classes
from util.files import atomic_path

_VERSION = 3  # of the arrays and of the checks that fill them
_MIN_BYTES = 4_000_000  # smaller files are read again in a moment
_KEPT = 16  # files
_DIGEST = 32  # bytes of SHA-256


def read_content(path: Path, *, need_boxes: bool, cache: bool) -> CocoContent:
    """Return the checked content of a COCO-format file, from the cache where it is there.

    What is kept serves training and evaluation alike.

    Raises:
        DataError: see `parse_json` and `check_content`.
    """
    data = read_bytes(path)
    if not cache or len(data) < _MIN_BYTES:
        return _check(data, path, need_boxes=need_boxes)
    file = cache_folder() / f"{hashlib.sha256(data).hexdigest()}-{_VERSION}"
    content = _load(file)
    # What was kept without annotations may lack the list of them: that is refused here.
    if content is None or (need_boxes and not len(content.annotations.ids)):
        content = _check(data, path, need_boxes=need_boxes)
        with contextlib.suppress(OSError):  # no room or no right to write: read anew next time
            _save(file, content)
    return content


def _check(data: bytes, path: Path, *, need_boxes: bool) -> CocoContent:
    return check_content(Source(parse_json(data, path), Path(), path), need_boxes=need_boxes)


def cache_folder() -> Path:
    """Return where indices are kept: in $XDG_CACHE_HOME, by default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "deformable_detr" / "index"


def _save(file: Path, content: CocoContent) -> None:
    """Write in one step; of processes that write at once, the last wins."""
    others = {
        "classes": content.classes.to_json(),
        "notices": [notice.to_json() for notice in content.notices],
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        others=np.frombuffer(json.dumps(others).encode(), dtype=np.uint8),
        image_ids=content.images.ids,
        name_data=content.images.file_names.data,
        name_ends=content.images.file_names.ends,
        sizes=content.images.sizes,
        **{f"box_{f.name}": getattr(content.annotations, f.name) for f in fields(Annotations)},
    )
    with atomic_path(file) as temporary, temporary.open("wb") as opened:
        opened.write(hashlib.sha256(buffer.getbuffer()).digest())
        opened.write(buffer.getbuffer())
    by_age = sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-_KEPT]:
        old.unlink(missing_ok=True)


def _load(file: Path) -> CocoContent | None:
    """Return what was saved, None where there is nothing sound."""
    try:
        raw = memoryview(file.read_bytes())
    except OSError:
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # the longest unused goes first
    if hashlib.sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
        return None
    with np.load(io.BytesIO(raw[_DIGEST:]), allow_pickle=False) as saved:
        arrays = dict(saved.items())
    others = json.loads(arrays["others"].tobytes())
    return CocoContent(
        Classes.from_json(others["classes"]),
        Images(
            arrays["image_ids"],
            Names(arrays["name_data"], arrays["name_ends"]),
            arrays["sizes"],
        ),
        Annotations(*(arrays[f"box_{f.name}"] for f in fields(Annotations))),
        tuple(Notice.from_json(notice) for notice in others["notices"]),
    )
