"""Curves as a table for spreadsheets."""

import csv
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from engine.trackers import TRACKERS
from util.files import atomic_path


@TRACKERS.register("csv")
class Table:
    """`scalars.csv`: a row per step and value. Names are not columns, as they are not known before.

    Images are left out.
    """

    def __init__(self, folder: Path, since: int | None) -> None:
        self._path = folder / "scalars.csv"
        if self._path.exists() and since is not None:
            _keep_before(self._path, since)
        self._open()

    def _open(self) -> None:
        begun = self._path.exists()
        self._file = self._path.open("a", encoding="utf-8", newline="", buffering=1)
        self._rows = csv.writer(self._file)
        if not begun:
            self._rows.writerow(("step", "name", "value"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; a table that was removed begins anew.

        Raises:
            FileNotFoundError: its folder was removed, too.
        """
        if not self._path.exists():  # what is open would take the rows with it
            self._file.close()
            self._open()
        self._rows.writerows((step, name, value) for name, value in values.items())

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """See `Tracker`."""

    def close(self) -> None:
        """See `Tracker`."""
        self._file.close()


def _keep_before(path: Path, since: int) -> None:
    """Rewrite a table without the rows of a step and later ones, and without a torn one."""
    with (
        path.open(encoding="utf-8", errors="replace", newline="") as file,
        atomic_path(path) as part,
        part.open("w", encoding="utf-8", newline="") as new,
    ):
        rows = csv.writer(new)
        for line in file:
            row = next(csv.reader([line]), []) if line.endswith("\n") else []
            if len(row) == 3 and (row[0] == "step" or (row[0].isdigit() and int(row[0]) < since)):
                rows.writerow(row)
