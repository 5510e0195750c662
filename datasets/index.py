"""A checked split of a data set of any format, in flat arrays, and what is kept of large files.

What was read of a large COCO-format file, or of a folder of many files, is kept, so that the next
run need not read it again. What is kept is a file in the user's cache folder. Its name is a hash of
the JSON's bytes, or of the names, sizes and times of the folder's files, and it ends with a hash of
its own content: one that is damaged, half written or of other data is never used. Nothing is
written next to the data.
"""

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datasets.arrays import Annotations, Images, Names
from datasets.checks.boxes import check_boxes, clip_some
from datasets.checks.entries import CocoContent, check_content, read_piece
from datasets.checks.findings import Notice, SplitReport
from datasets.checks.images import check_headers
from datasets.formats.coco import LARGEST, parse_coco, read_bytes, require_folder
from datasets.formats.coco_pieces import Unsuitable, file_digest, read_pieces
from datasets.formats.registry import USUAL, Reading, Source
from datasets.formats.stamps import Stamp
from util.classes import Classes
from util.console import console, in_line, short_name
from util.errors import DataError
from util.files import atomic_path, open_regular

_CLASSES_SHOWN = 12
_VERSION = 8  # of the kept arrays, and of the readers and checks that fill them
_MIN_BYTES = 4_000_000  # smaller files are read again in a moment
_MIN_FILES = 1000  # in folders with fewer, too
_LARGE = 1 << 26  # bytes of files that are parsed in pieces
_BLOCK = 1 << 20  # bytes that are hashed at once
_MOST_BYTES = 2**34  # of a kept file
_KEPT = 16  # files
_DIGEST = 32  # bytes of SHA-256


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """A split of a data set of any format, checked, in flat arrays.

    `annotations` are those that evaluation counts, as in the file. Training uses a part of them,
    clipped: image i has `boxes[first[i]:first[i + 1]]` ([B,4] xyxy pixels) with `labels` [B].
    `findings` are all that was fixed or left out; `place` is where the data came from.
    """

    place: Path
    image_dir: Path
    classes: Classes
    images: Images
    annotations: Annotations
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    first: NDArray[np.int64]
    findings: tuple[Notice, ...]

    @classmethod
    def load(
        cls,
        json_path: Path,
        image_dir: Path | None,
        *,
        need_boxes: bool,
        cache: bool = False,
        reading: Reading = USUAL,
        classes: Classes | None = None,
    ) -> "CocoIndex":
        """Read and check a COCO-format file and the folder of its images, if there is one.

        With `cache`, the content of a large file is kept for the next time, for training and
        evaluation alike. `classes` are the categories of a file that has none.

        Raises:
            DataError: see `require_folder`, `parse_coco`, `check_content` and `from_content`.
        """
        if image_dir is not None:
            require_folder(image_dir)
        data = None if _is_large(json_path) else read_bytes(json_path)
        file = content = before = None
        if cache and (data is None or len(data) >= _MIN_BYTES):
            meant = "-".join(str(value) for value in asdict(reading).values())
            with contextlib.suppress(OSError):  # no home folder
                before = _times(json_path)
                digest = (
                    file_digest(json_path) if data is None else hashlib.sha256(data).hexdigest()
                )
                file = cache_folder() / f"{digest}-{meant}-{_VERSION}"
                content = _load(file)
        # What was kept without annotations may lack the list of them: that is refused here.
        if content is None or (need_boxes and not len(content.annotations.ids)):
            whole = (
                _parse_large(json_path, reading) if data is None else parse_coco(data, json_path)
            )
            source = Source(whole, Path(), json_path, reading=reading)
            if classes is not None and not source.content.get("categories"):
                source.content["categories"] = [
                    {"id": classes.ids[i], "name": classes.shown(i)}
                    for i in range(len(classes))
                    if classes.in_use(i)
                ]
                console(f"  notice: {json_path}: has no categories, so the model's are taken")
                file = None  # with another model they would be others
            content = check_content(source, need_boxes=need_boxes)
            with contextlib.suppress(OSError):  # no room or no right to write: read again next time
                # a large file was opened again since its hash was made
                if file is not None and (data is not None or _times(json_path) == before):
                    _save(file, content)
        return cls.from_content(content, json_path, image_dir, need_boxes=need_boxes)

    @classmethod
    def kept(
        cls, stamp: Stamp | None, read: Callable[[], Source], *, need_boxes: bool
    ) -> "CocoIndex":
        """Check what `read` returns, or take what was kept of a large set with the same stamp.

        Without a stamp nothing is kept, nor where a file has just been written: another change in
        the same moment would not show.

        Raises:
            DataError: see `from_source`.
        """
        if stamp is None or stamp.files < _MIN_FILES or not stamp.settled:
            return cls.from_source(read(), need_boxes=need_boxes)
        file = content = None
        with contextlib.suppress(OSError):  # no home folder
            file = cache_folder() / f"{stamp.digest()}-{_VERSION}"
            content = _load(file)
        if content is None or (need_boxes and not len(content.annotations.ids)):
            source = read()
            content = replace(
                check_content(source, need_boxes=need_boxes),
                source=(source.place, source.image_dir),
            )
            with contextlib.suppress(OSError):
                if file is not None:
                    _save(file, content)
        assert content.source is not None
        return cls.from_content(content, *content.source, need_boxes=need_boxes)

    @classmethod
    def from_source(cls, source: Source, *, need_boxes: bool) -> "CocoIndex":
        """Check what was read of a data set, and its images.

        Without `need_boxes` there may be no annotations (as test-dev has none).

        Raises:
            DataError: see `check_content` and `from_content`.
        """
        return cls.from_content(
            check_content(source, need_boxes=need_boxes),
            source.place,
            source.image_dir,
            need_boxes=need_boxes,
        )

    @classmethod
    def from_content(
        cls,
        content: CocoContent,
        place: Path,
        image_dir: Path | None,
        *,
        need_boxes: bool,
        every_size: bool = False,
    ) -> "CocoIndex":
        """Check content against the images, unless their folder is None.

        The stated sizes of some images are compared with their files, or with `every_size` of all.

        Raises:
            DataError: none of the images is in the folder, or there is no box to train on although
                `need_boxes`.
        """
        report = SplitReport(Source({}, image_dir or Path(), place))
        report.classes, report.images = content.classes, content.images
        report.annotations = content.annotations
        report.image_rows = np.arange(len(content.images.ids))
        report.annotation_rows = np.arange(len(content.annotations.ids))
        if image_dir is not None:
            check_headers(report, every_size=every_size)
        check_boxes(report)
        notices = (*content.notices, *report.notices)
        if need_boxes and not report.trained.any():
            raise DataError(
                f"{place}: none of the {len(content.annotations.ids)} annotations is a usable box. "
                + (
                    f"Found: {'; '.join(n.text for n in notices)}."
                    if notices
                    else "Use another file."
                )
            )
        # Training and evaluation take the numbers as they are, whatever layout they seem to have.
        order = np.flatnonzero(report.trained)
        order = order[np.argsort(report.annotations.image[order], kind="stable")]
        image = report.annotations.image[order]
        return cls(
            place=place,
            image_dir=report.source.image_dir,
            classes=content.classes,
            images=report.images,
            annotations=report.annotations.with_area(),
            boxes=clip_some(report, order),
            labels=report.annotations.labels[order],
            first=np.searchsorted(image, np.arange(len(report.images.ids) + 1)),
            findings=notices,
        )

    def __len__(self) -> int:
        return len(self.images.ids)

    def part(self, share: float) -> "CocoIndex":
        """Return a share of the images, one at least, evenly spaced, with what is in them.

        The findings stay those of the whole split.
        """
        count = max(1, round(share * len(self)))
        return self._of(np.linspace(0, len(self) - 1, count).round().astype(np.int64))

    def with_background(self, share: float) -> "CocoIndex":
        """Return the images with boxes, and a share of the others, evenly spaced.

        The findings stay those of the whole split.
        """
        empty = np.flatnonzero(self.boxes_per_image == 0)
        kept = np.linspace(0, len(empty) - 1, round(share * len(empty))).round().astype(np.int64)
        return self._of(np.setdiff1d(np.arange(len(self)), np.delete(empty, kept)))

    def _of(self, kept: NDArray[np.int64]) -> "CocoIndex":
        """Return some of the images, by ascending positions."""
        position = np.full(len(self), -1, dtype=np.int64)
        position[kept] = np.arange(len(kept))
        annotations = self.annotations.select(np.flatnonzero(position[self.annotations.image] >= 0))
        rows = np.flatnonzero(np.repeat(position >= 0, self.boxes_per_image))
        return replace(
            self,
            images=self.images.select(position >= 0),
            annotations=replace(annotations, image=position[annotations.image]),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            first=np.concatenate([[0], np.cumsum(self.boxes_per_image[kept])]),
        )

    def require_images(self) -> None:
        """Raise DataError if none of the images is on this machine."""
        if not any(os.path.isfile(self.image_dir / name) for name in self.images.file_names):
            raise DataError(
                f"{self.image_dir}: none of the images is there on {socket.gethostname()}. Every "
                "machine of a run must have the same files at the same place."
            )

    @property
    def notices(self) -> list[str]:
        """A line on each kind of thing that was fixed or left out."""
        return [finding.text for finding in self.findings]

    @property
    def boxes_per_image(self) -> NDArray[np.int64]:
        """Usable boxes of each image."""
        return np.diff(self.first)

    def report(self, num_queries: int) -> str:
        """Return the summary and a line on everything that was fixed or cannot be detected."""
        notices = self.notices
        crowded = self.boxes_per_image > num_queries
        if crowded.any():
            notices.append(
                f"{int(crowded.sum())} images have more boxes (up to "
                f"{int(self.boxes_per_image.max())}) than the model has queries "
                f"({num_queries}): the rest can never be found. Raise `num_queries`."
            )
        return "\n".join([self.summary(), *(f"  notice: {notice}" for notice in notices)])

    def data_report(self) -> dict[str, Any]:
        """Return what was fixed or left out, in plain values, with the ids of each kind."""
        return {
            "place": str(self.place),
            "images": len(self),
            "boxes": len(self.boxes),
            "findings": [finding.to_json() for finding in self.findings],
        }

    def summary(self) -> str:
        """Return a line of counts and a line with the boxes of each class, most frequent first."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        names = self.classes.names
        shown = [f"{short_name(names[k])} {counts[k]}" for k in order[:_CLASSES_SHOWN]]
        rest = len(self.classes) - len(shown)
        more = [f"{rest} more with {counts[order[_CLASSES_SHOWN:]].sum()}"] if rest else []
        return (
            f"{in_line(self.place.name)}: {len(self)} images, {len(self.boxes)} boxes, "
            f"{int((self.boxes_per_image == 0).sum())} images without boxes, "
            f"{int(self.annotations.crowd.sum())} crowd boxes, {len(self.classes)} classes\n"
            f"  boxes by class: {', '.join([*shown, *more])}"
        )


def _is_large(path: Path) -> bool:
    try:
        return _LARGE <= path.stat().st_size <= LARGEST
    except OSError:
        return False


def _times(path: Path) -> tuple[int, int, int]:
    """Return when a file changed, in nanoseconds, content and entry, and its bytes."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _parse_large(path: Path, reading: Reading) -> dict[str, Any]:
    """Return what a large file holds, its annotations in arrays where that can be.

    Raises:
        DataError: see `read_bytes` and `parse_coco`.
    """
    with contextlib.suppress(Unsuitable, OSError):
        return read_pieces(path, "annotations", partial(read_piece, reading=reading))
    return parse_coco(read_bytes(path), path)


def cache_folder() -> Path:
    """Return where indices are kept: in $XDG_CACHE_HOME, by default ~/.cache.

    Raises:
        OSError: there is neither, as for a user without a home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):  # it stays as it is where nothing is known of the user
        raise FileNotFoundError(errno.ENOENT, "no home folder", root)
    return Path(root, "deformable_detr", "index")


def _save(file: Path, content: CocoContent) -> None:
    """Write in one step; of processes that write at once, the last wins."""
    others = {
        "classes": content.classes.to_json(),
        "notices": [asdict(notice) for notice in content.notices],
        "texts": list(content.images.texts.items()),
        "source": list(map(str, content.source)) if content.source else None,
    }
    with atomic_path(file) as temporary, temporary.open("w+b") as opened:
        np.savez(
            opened,
            others=np.frombuffer(json.dumps(others).encode(), dtype=np.uint8),
            image_ids=content.images.ids,
            name_data=content.images.file_names.data,
            name_ends=content.images.file_names.ends,
            sizes=content.images.sizes,
            address_data=content.images.addresses.data,
            address_ends=content.images.addresses.ends,
            **{f"box_{f.name}": getattr(content.annotations, f.name) for f in fields(Annotations)},
        )
        opened.write(_digest(opened, opened.seek(0, os.SEEK_END)))
    for old in sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
        old.unlink(missing_ok=True)


def _load(file: Path) -> CocoContent | None:
    """Return what was saved, None where there is nothing sound, or nothing of this user."""
    try:
        with open_regular(file, _MOST_BYTES) as opened:
            status = os.fstat(opened.fileno())
            if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
                return None  # others could change the boxes
            length = status.st_size - _DIGEST
            if length < 0 or _digest(opened, length) != opened.read():
                return None
            with contextlib.suppress(OSError):
                os.utime(file)  # the longest unused goes first
            return _unpack(opened)
    except Exception:  # not there; what was damaged before it was hashed fails in any way
        return None


def _digest(file: BinaryIO, length: int) -> bytes:
    """Return the hash of a file's first bytes, and leave its position after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while length and (block := file.read(min(length, _BLOCK))):
        digest.update(block)
        length -= len(block)
    return digest.digest()


def _unpack(file: BinaryIO) -> CocoContent:
    """Return the content of which `_save` made a file."""
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        others = json.loads(saved["others"].tobytes())
        return CocoContent(
            Classes.from_json(others["classes"]),
            Images(
                saved["image_ids"],
                Names(saved["name_data"], saved["name_ends"]),
                saved["sizes"],
                {int(number): str(text) for number, text in others["texts"]},
                Names(saved["address_data"], saved["address_ends"]),
            ),
            Annotations(*(saved[f"box_{f.name}"] for f in fields(Annotations))),
            tuple(Notice(**notice) for notice in others["notices"]),
            others["source"] and tuple(map(Path, others["source"])),
        )
