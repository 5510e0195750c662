"""Numbers for the objects of a video that stay the same from frame to frame."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from engine.detector import Box
from util.errors import ConfigError

_LOWEST = 1 / 6  # of its class's threshold: what still follows an object (the paper: 0.1 and 0.6)
_RATE = 30  # frames a second in which the library counts its patience


class Tracks:
    """Gives boxes of consecutive frames the number of their object, counted from 1.

    ByteTrack (arXiv 2110.06864) as the package `trackers` has it, for each class alone: boxes that
    reach the score threshold of their class begin objects, from their second frame on, and less
    sure ones only continue them. An object that is lost for longer than `patience` seconds gets
    another number.
    """

    def __init__(self, thresholds: Mapping[str, float], *, rate: float, patience: float) -> None:
        """Begin a video of `rate` frames a second; classes without a threshold are not tracked.

        Raises:
            ConfigError: the package is missing.
        """
        try:
            from supervision import Detections
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise ConfigError(
                "track: needs the package trackers, which cannot be imported "
                f"({error}). Install it: pip install trackers"
            ) from None
        self._detections: Any = Detections
        self._trackers: dict[str, Any] = {
            name: ByteTrackTracker(
                lost_track_buffer=round(patience * _RATE),
                frame_rate=rate,
                track_activation_threshold=threshold,
                high_conf_det_threshold=threshold,
                minimum_consecutive_frames=1,
            )
            for name, threshold in thresholds.items()
        }
        self._thresholds = thresholds
        self._patience = ceil(patience * rate) + 1
        # by class and the library's number: ours, and the frame in which the object was last seen
        self._objects: OrderedDict[tuple[str, int], tuple[int, int]] = OrderedDict()
        self._frame = self._count = 0

    def __call__(self, boxes: Sequence[Box]) -> list[int | None]:
        """Return the number of the object of each box of the next frame, None if it has none."""
        numbers: list[int | None] = [None] * len(boxes)
        rows_of: dict[str, list[int]] = {name: [] for name in self._trackers}
        for row, box in enumerate(boxes):
            if box.score >= _LOWEST * self._thresholds.get(box.name, np.inf):
                rows_of[box.name].append(row)
        for name, rows in rows_of.items():
            corners = np.array([boxes[row].xyxy for row in rows], dtype=np.float64)
            found = self._trackers[name].update(
                self._detections(
                    xyxy=corners.reshape(-1, 4),
                    confidence=np.array([boxes[row].score for row in rows], dtype=np.float64),
                    data={"row": np.array(rows, dtype=np.int64)},
                )
            )
            if len(found):
                for row, number in zip(found.data["row"], found.tracker_id, strict=True):
                    numbers[int(row)] = self._number(name, int(number)) if number >= 0 else None
        self._frame += 1
        while (
            self._objects and next(iter(self._objects.values()))[1] < self._frame - self._patience
        ):
            self._objects.popitem(last=False)  # a video may go on for ever
        return numbers

    def _number(self, name: str, theirs: int) -> int:
        if (name, theirs) not in self._objects:
            self._count += 1
        ours, _ = self._objects.get((name, theirs), (self._count, 0))
        self._objects[name, theirs] = ours, self._frame
        self._objects.move_to_end((name, theirs))
        return ours
