"""What a checkpoint finds in the frames of a video: a video with boxes, and a line per frame."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from engine.detector import Box, Detector
from engine.predictions import (
    BOX_COLUMNS,
    box_columns,
    crop_folders,
    open_table,
    plain_boxes,
    save_crops,
    with_boxes,
)
from engine.tracking import Tracks
from util.classes import Classes
from util.console import console, log
from util.errors import ConfigError, DataError
from util.files import make_output_dir, refuse_overwriting
from util.progress import progress

_SUFFIXES = (
    ".mp4",
    ".avi",
    ".mov",
    ".mkv",
    ".webm",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ts",
    ".m2ts",
    ".3gp",
)
_CODECS = ("libx264", "mpeg4")  # the first that FFmpeg was built with
_USUAL_RATE = 25  # frames a second, of streams that state none
_WAIT = 30.0  # seconds, for the first answer of a server, and between its packets


def is_video(text: str) -> bool:
    """Return whether an input is a video file, an address or the number of a camera."""
    path = Path(text)
    if "://" in text:
        return True
    if text.isascii() and text.isdigit():
        return not path.exists()
    return path.suffix.lower() in _SUFFIXES and not path.is_dir()


class Frames:
    """The frames of a video, upright, with their times in seconds; iterable, a context manager.

    `rate` is in frames a second; `count` is as the file states it, None where it does not.
    """

    def __init__(self, text: str) -> None:
        """Open a video file, an address, or a camera by its number.

        Raises:
            ConfigError: PyAV is missing, or cameras cannot be read here.
            DataError: there is no video.
        """
        self._av: Any = _import_av()
        self.name = text
        options: dict[str, Any] = {"timeout": _WAIT} if "://" in text else {}
        if text.isdigit():
            if not sys.platform.startswith("linux"):
                raise ConfigError(f"`input {text}`: cameras are only read on Linux. Give a file.")
            text, options = f"/dev/video{text}", {"format": "v4l2"}
        try:
            self._container = self._av.open(text, **options)
        except (OSError, ValueError, self._av.error.FFmpegError) as error:
            raise DataError(
                f"`input {self.name}`: cannot be opened ({error}). Check the name and the file."
            ) from None
        try:
            if not self._container.streams.video:
                raise DataError(f"`input {self.name}`: there is no video in it. Give another.")
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
            width, height = self._stream.width, self._stream.height
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise DataError(
                    f"`input {self.name}`: {width}x{height} pixels are more than the {limit} of "
                    "`max_pixels`; raise it if the file is sound."
                )
        except DataError:
            self._container.close()
            raise
        self.rate = Fraction(self._stream.average_rate or _USUAL_RATE)
        self.count: int | None = self._stream.frames or None

    def __enter__(self) -> "Frames":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[tuple[float | None, Image.Image]]:
        number = 0
        try:
            for frame in self._container.decode(self._stream):
                number += 1
                image: Image.Image = frame.to_image()
                if frame.rotation:  # of a telephone; in degrees against the clock, as Pillow's
                    image = image.rotate(frame.rotation, expand=True)
                yield frame.time, image
        except self._av.error.FFmpegError as error:
            if not number:
                raise DataError(
                    f"`input {self.name}`: no frame can be read ({error}). Check the file."
                ) from None
            log.warning(
                f"{self.name}: damaged after frame {number} ({error}); the rest is left out"
            )


class VideoFile:
    """A video that is written frame by frame; a context manager. It plays even after an error."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        """Begin a file; its size is that of the first frame."""
        self._av: Any = _import_av()
        self._container = self._av.open(str(path), "w")
        codec = next(name for name in _CODECS if name in self._av.codecs_available)
        self._stream = self._container.add_stream(codec, rate=rate)
        self._stream.pix_fmt = "yuv420p"  # what every player knows
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._size is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def add(self, image: Image.Image) -> None:
        """Write a frame, scaled to the size of the first one where a stream has changed it."""
        if self._size is None:
            # two pixels share a colour, so sides must be even
            self._size = (max(image.width // 2 * 2, 2), max(image.height // 2 * 2, 2))
            self._stream.width, self._stream.height = self._size
        if image.size != self._size:
            even = (image.width // 2 * 2, image.height // 2 * 2)
            same = even == self._size
            image = image.crop((0, 0, *self._size)) if same else image.resize(self._size)
        frame = self._av.VideoFrame.from_image(image)
        self._container.mux(self._stream.encode(frame))


class FrameFiles:
    """What is written of the frames of a video, one after the other; a context manager.

    `predictions.jsonl` has a line per frame, with boxes of every score. Those that are *shown* are
    drawn in the `video`, if there is to be one, and are rows of `predictions.csv` with `table` and
    files in `crops/CLASS/` with `crops`, of whose classes it gets the folders' names.
    """

    def __init__(
        self,
        output_dir: Path,
        classes: Classes,
        *,
        video: VideoFile | None,
        table: bool,
        crops: Mapping[str, str],
    ) -> None:
        self._folder, self._classes = output_dir, classes
        self._video, self._crop_folders = video, crops
        with ExitStack() as opened:
            lines = (output_dir / "predictions.jsonl").open("w", encoding="ascii")
            self._lines = opened.enter_context(lines)
            self._rows: Any = None
            if table:
                path, columns = output_dir / "predictions.csv", ("frame", "time", "track")
                self._rows = open_table(path, (*columns, *BOX_COLUMNS), opened)
            self._opened = opened.pop_all()
        self.frames = self.boxes = 0

    def __enter__(self) -> "FrameFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def add(
        self,
        image: Image.Image,
        time: float | None,
        boxes: Sequence[Mapping[str, Any]],
        shown: Sequence[tuple[Box, int | None]],
    ) -> None:
        """Write a frame: its time in seconds, its boxes in plain values, those shown by object."""
        number = self.frames
        self._lines.write(f"{json.dumps({'frame': number, 'time': time, 'boxes': boxes})}\n")
        chosen = [box for box, _ in shown]
        if self._video is not None:
            names = [box.name if of is None else f"{box.name} #{of}" for box, of in shown]
            self._video.add(with_boxes(image, chosen, self._classes, names))
        if self._rows is not None:
            self._rows.writerows(
                (number, time, of, *box_columns(box, self._classes)) for box, of in shown
            )
        if self._crop_folders:
            save_crops(image, chosen, self._folder, self._crop_folders, f"frame_{number}")
        self.frames += 1
        self.boxes += len(shown)

    def flush(self) -> None:
        """Let others read along."""
        self._lines.flush()


def predict_video(
    detector: Detector,
    text: str,
    output_dir: Path,
    *,
    thresholds: Mapping[str, float],
    draw: bool = True,
    table: bool = False,
    crops: bool = False,
    batch_size: int = 1,
    track_patience: float | None = None,
) -> None:
    """Write what is found in the frames of a video, see `FrameFiles`, as soon as it is found.

    The video with boxes has the name of the input, as `.mp4`. Boxes that reach the threshold of
    their class are shown. Classes without a threshold are left out. At most `batch_size` frames are
    in memory. With `track_patience`, in seconds, boxes have the number of their object, see
    `Tracks`, and all that have one are shown.

    Raises:
        ConfigError: PyAV or `trackers` is missing, or the video with boxes would overwrite the
            input.
        DataError: there is no video, or none of its frames can be read.
    """
    stem = f"camera_{text}" if text.isdigit() else Path(text.partition("?")[0]).stem or "stream"
    output = output_dir / f"{stem}.mp4"
    if draw and "://" not in text:
        refuse_overwriting([Path(text)], [output])
    make_output_dir(output_dir)
    with ExitStack() as stack:
        frames = stack.enter_context(Frames(text))
        tracks = None  # before files are opened for writing, as its package may be missing
        if track_patience is not None:
            tracks = Tracks(thresholds, rate=float(frames.rate), patience=track_patience)
        files = stack.enter_context(
            FrameFiles(
                output_dir,
                detector.classes,
                video=stack.enter_context(VideoFile(output, frames.rate)) if draw else None,
                table=table,
                crops=crop_folders(list(thresholds)) if crops else {},
            )
        )
        bar = stack.enter_context(progress(total=frames.count, unit="frame", description="predict"))
        iterator = iter(frames)
        while batch := list(islice(iterator, batch_size)):
            images = [image for _, image in batch]
            found = dict(detector.detect(images, batch_size=batch_size, tiling=detector.tiling))
            for i, (time, image) in enumerate(batch):
                boxes = [box for box in found[i] if box.name in thresholds]
                plain = plain_boxes(boxes, detector.classes)
                numbers = [None] * len(boxes) if tracks is None else tracks(boxes)
                if tracks is not None:
                    plain = [{**p, "track": n} for p, n in zip(plain, numbers, strict=True)]
                shown = [
                    (box, number)
                    for box, number in zip(boxes, numbers, strict=True)
                    if number is not None or box.score >= thresholds[box.name]
                ]
                files.add(image, time, plain, shown)
            files.flush()
            bar.update(len(batch))
        if not files.frames:
            raise DataError(f"`input {text}`: there are no frames in it. Give another.")
    written = [output.name] * draw + ["predictions.csv"] * table + ["predictions.jsonl"]
    console(
        f"written to {output_dir}: {files.frames} frames with {files.boxes} boxes, "
        f"{' and '.join(written)}"
    )


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ConfigError(
            "`input`: videos are read with PyAV, which is not installed. Install it: pip install av"
        ) from None
    return av
