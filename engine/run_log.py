"""Logs of a run: one JSON line per step and per epoch, curves for trackers, the console."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm import tqdm

from engine.trackers import GuardedTracker
from util.console import log
from util.errors import ConfigError
from util.files import atomic_path, make_output_dir
from util.json_lines import json_lines
from util.progress import progress


def _keep_until(path: Path, key: str, last: int) -> None:
    """Rewrite a log without the lines whose `key` lies past `last` and without a torn one."""
    if not path.is_file():
        return
    with atomic_path(path) as part, part.open("w", encoding="utf-8") as new:
        for line, entry in json_lines(path):  # one at a time: a long run has gigabytes of them
            place = entry.get(key)
            if type(place) is int and place <= last:
                new.write(f"{line}\n")


def _check_places(folder: Path) -> None:
    """Raise ConfigError if something else is in the way; writing to a pipe would never end."""
    for name in ("metrics.jsonl", "log.txt", "scalars.csv", "tensorboard", "pictures", "nonfinite"):
        path = folder / name
        fits = path.is_file() if "." in name else path.is_dir()
        if os.path.lexists(path) and not fits:
            raise ConfigError(
                f"output_dir {folder}: '{name}' in it is not what a run writes there. "
                "Choose another folder."
            )


class _JsonLines:
    """A file to which each call of `append` adds a line, which the end of the process keeps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def append(self, values: Mapping[str, Any]) -> None:
        """Write a line of strict JSON, in which numbers that are not finite are null.

        The run outlives its folder: one that was removed is made again.
        """
        strict = json.loads(json.dumps(values), parse_constant=lambda _: None)
        self._open().write(json.dumps(strict) + "\n")

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        """Return the file that has this path now, which need not be the one of the last line."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                opened = os.fstat(self._file.fileno())
                if os.path.samestat(opened, self._path.stat()):
                    return self._file
        self.close()
        folder = self._path.parent
        if not folder.is_dir():
            log.warning(f"{folder}: the folder was removed during the run and is made again")
            make_output_dir(folder)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)  # by line
        return self._file


class RunLog:
    """Append-only logs in a run's folder; a context manager.

    `metrics.jsonl` has a line per step, `log.txt` a line per epoch; the trackers that `log_to`
    names get the same as curves. Non-finite numbers are null in the JSON files. Where `enabled` is
    false, nothing is written: another process of the run does it.
    """

    def __init__(
        self, output_dir: Path, *, log_to: Sequence[str] = (), enabled: bool = True
    ) -> None:
        """Open the logs.

        Raises:
            ConfigError: something else is in the way, or a tracker is unknown or not installed.
        """
        self._trackers: list[GuardedTracker] = []
        if enabled:
            make_output_dir(output_dir)
            _check_places(output_dir)
            self._trackers = [GuardedTracker(name, output_dir) for name in dict.fromkeys(log_to)]
        self._enabled = enabled
        self._steps_path = output_dir / "metrics.jsonl"
        self._epochs_path = output_dir / "log.txt"
        self._steps = _JsonLines(self._steps_path)
        self._epochs = _JsonLines(self._epochs_path)
        self._opened = contextlib.ExitStack()
        self._opened.callback(self._steps.close)
        self._opened.callback(self._epochs.close)
        for tracker in self._trackers:
            self._opened.callback(tracker.close)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def truncate_after(self, step: int, epoch: int) -> None:
        """Remove what was logged past the checkpoint that a run continues from, before it does.

        Lines of `metrics.jsonl` with a greater `step`, lines of `log.txt` with a greater `epoch`
        and what trackers have of later steps, as far as they let go of it.
        """
        if self._enabled:
            _keep_until(self._steps_path, "step", step)
            _keep_until(self._epochs_path, "epoch", epoch)
            for tracker in self._trackers:
                tracker.since = step + 1

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a training step."""
        if self._enabled:
            self._steps.append({"step": step, **values})
        self.scalars(step, values)

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Log the values of an epoch; `epoch` is one of them."""
        if "epoch" not in values:
            raise ValueError("an epoch's values need the key 'epoch'")
        if self._enabled:
            self._epochs.append(values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add points to the curves of trackers."""
        for write in self._trackers:
            write(lambda tracker: tracker.scalars(step, values))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Add an image to trackers."""
        for write in self._trackers:
            write(lambda tracker: tracker.image(name, image, step))

    def progress_bar(self, total: int | None, *, done: int) -> "tqdm[Any]":
        """Return a bar over the steps of the run, as far as their number is known."""
        return progress(total=total, done=done, unit="step", enabled=self._enabled, leave=True)
